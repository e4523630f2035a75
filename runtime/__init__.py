"""Ground floor: what every stage stands on. Recipes, run folders, ranks, signals, files. Nothing here imports torch at import."""
