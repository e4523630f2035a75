"""Recipes (YAML) that ship with Ligature, by stage: `data/`, `pretrain/`, `finetune/`, `launch/`."""
