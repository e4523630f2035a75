"""What a mistaken key or recipe file was meant to be: words that other projects use, and spelling.

Tested in tests/runtime/test_recipe.py.
"""

from __future__ import annotations

import difflib
from pathlib import Path

SYNONYMS = {
    "training.global_batch": "batch batch_size bs global_batch_size train_batch_size per_device_train_batch_size",
    "batch_size": "batch bs micro_batch eval_batch_size",
    "training.micro_batch": "accum_freq accumulation gradient_accumulation_steps grad_accum microbatch",
    "training.steps": "max_steps num_steps total_steps iterations iters train_steps",
    "training.epochs": "num_epochs max_epochs num_train_epochs epoch",
    "training.precision": "amp dtype bf16 fp16 mixed_precision autocast",
    "training.device": "gpu cuda accelerator",
    "training.seed": "random_seed manual_seed",
    "training.log_every": "log_every_n_steps logging_steps print_freq log_interval",
    "training.checkpoint_every": "save_every save_freq save_frequency save_steps save_interval",
    "training.validate_every": "eval_every val_frequency eval_steps eval_interval val_check_interval",
    "training.keep_last": "save_total_limit keep",
    "training.checkpoint_activations": "grad_checkpointing gradient_checkpointing activation_checkpointing",
    "training.compile": "torchcompile torch_compile",
    "training.zero_stage": "zero stage deepspeed fsdp",
    "optimizer.lr": "learning_rate lr_max max_lr base_lr peak_lr rate",
    "optimizer.min_lr": "lr_min end_lr final_lr",
    "optimizer.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_epochs warmup_ratio",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2 beta",
    "optimizer.clip_norm": "grad_clip grad_clip_norm clip_grad max_grad_norm gradient_clipping clip",
    "optimizer.schedule": "scheduler lr_scheduler lr_scheduler_type",
    "data.train": "train_data train_dir train_folder train_path dataset_path shards",
    "data.validation": "val val_data valid eval_data validation_data val_dir",
    "data.workers": "num_workers dataloader_num_workers loaders",
    "workers": "num_workers dataloader_num_workers num_proc",
    "data.caption_tokens": "max_length max_words context_length max_seq_length text_length",
    "data.augment.crop_scale": "aug_scale random_resized_crop min_scale",
    "data": "dataset_path data_path data_dir val_data shards images_folder",
    "model.image.image_size": "image_size img_size resolution image_res force_image_size",
    "image_size": "img_size resolution image_res force_image_size",
    "model.image.architecture": "vision_model image_encoder backbone vit arch",
    "model.text.weights": "text_encoder bert",
    "model.feature_dim": "embed_dim embedding_dim proj_dim projection_dim feature_size",
    "model.temperature": "temp tau logit_scale",
    "model.codewords": "codebook_size num_codes num_codewords prototypes num_prototypes",
    "teacher.ema_momentum": "ema momentum ema_decay m",
    "teacher.queue": "queue_size queue_length k",
    "teacher.distill_weight": "alpha distill",
    "objectives.contrastive.weight": "itc itc_weight clip_loss",
    "objectives.matching.weight": "itm itm_weight",
    "objectives.masked_language.weight": "mlm mlm_weight",
    "objectives.masked_language.share": "mlm_probability mask_ratio mask_prob",
    "checkpoint": "ckpt resume pretrained resume_from resume_from_checkpoint model model_path load_from init_from weights",
    "name": "run_name experiment exp_name job_name",
    "runs": "output output_dir out_dir logs logdir save_dir out",
    "out": "output output_dir out_dir result_file save_dir",
    "shortlist": "k_test topk top_k rerank",
}
"""Recipe key -> what other projects call it, separated by spaces. Each recipe has some of these keys."""


def suggest_key(key: str, keys: list[str]) -> str:
    """Return `; did you mean …?` with the key that was probably meant, or else where the keys are listed.

    Keys of the same group come first. A key with the same last part counts before another project's word for it, and that before a
    like spelling.

    Args:
        key: the unknown key, dotted.
        keys: the recipe's keys.
    """
    key = key.replace("-", "_")
    group, _, last = key.rpartition(".")
    near = [known for known in keys if group and known.startswith(f"{group}.")]
    meant = _same_or_synonym(last, key, near) or _like_spelling(last, near)
    if not meant:
        groups = sorted({known.rpartition(".")[0] for known in keys if "." in known})
        meant = _same_or_synonym(last, key, keys) or difflib.get_close_matches(key, keys + groups, n=1, cutoff=0.7)
    meant = meant or _like_spelling(last, keys)
    return f"; did you mean {meant[0]}?" if meant else "; `--help` lists the keys"


def _same_or_synonym(last: str, key: str, keys: list[str]) -> list[str]:
    """Return the keys that end in `last` or that other projects call so, most like the whole `key` first."""
    meant = [known for known in keys if known.rpartition(".")[2] == last]
    meant = meant or [known for known, words in SYNONYMS.items() if known in keys and last.lower() in words.split()]
    return sorted(meant, key=lambda known: -_likeness(known, key))


def _like_spelling(last: str, keys: list[str]) -> list[str]:
    """Return the keys whose last part is spelled like `last`, the likest first."""
    likeness = {known: _likeness(known.rpartition(".")[2], last) for known in keys}
    return sorted((known for known in keys if likeness[known] > 0.6), key=lambda known: -likeness[known])


def suggest_recipe(path: Path) -> str:
    """Return `; did you mean …?` with the recipe of the nearest name: a file beside that path, or a shipped recipe."""
    import configs

    shipped = Path(configs.__path__[0])
    names = [str(recipe) for recipe in sorted(path.parent.glob("*.y*ml"))]
    names += [str(recipe.relative_to(shipped)) for recipe in sorted(shipped.rglob("*.yaml"))]
    close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.6)
    close = close or [
        name for name in names if Path(name).name in difflib.get_close_matches(path.name, [Path(name).name], cutoff=0.6)
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
