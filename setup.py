"""Packages for setuptools; everything else is in pyproject.toml.

`configs/` is package data that stays at the top of the repository, which pyproject.toml cannot say beside a search for
packages.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sglang_step35*"]), "sglang_step35.configs"],
    package_dir={"sglang_step35.configs": "configs"},
)
