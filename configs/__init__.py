"""Recipes (YAML) that ship with Ligature, by stage: `pretrain/`, `finetune/`, `ablate/`, `launch/`."""
