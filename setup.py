"""List the packages: those that are found, and two folders of data, which pyproject.toml cannot say together."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["rlg*", "trainers*", "rewards*"]), "rlg.configs", "rlg.configs.accelerate"])
