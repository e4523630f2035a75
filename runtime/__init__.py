"""The ground floor: recipes, run folders, checkpoints, ranks, signals, files, pages. Importing a module here never imports torch."""
