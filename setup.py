"""Packages, and the configs: they stand beside the package in a clone and inside it in a wheel."""

from setuptools import find_packages, setup

setup(
  packages=[*find_packages(include=["jaxmethods*", "train*", "eval*"]), "jaxmethods.configs"],
  package_dir={"jaxmethods.configs": "configs"},
  package_data={"jaxmethods": ["py.typed"], "": ["*.pyi"], "jaxmethods.configs": ["*.yaml"]},
)
