"""Everything comes from settings.ini; an extra `x` is a line `x_requirements = ...` there.

The benchmark notebooks and the suite files travel inside the package.

The extra `dev` contains `bench`, and `all` contains every extra but `dev`.
"""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

statuses = [
    "1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]
pythons = "3.10 3.11 3.12 3.13".split()
suffix = "_requirements"
package = cfg["lib_path"]
extras = {k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)}
extras["dev"] = sorted({*extras["dev"], *extras["bench"]})
extras["all"] = sorted({r for name, needed in extras.items() if name != "dev" for r in needed})

setup(
    name=cfg["lib_name"],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    classifiers=[
        f"Development Status :: {statuses[int(cfg['status']) - 1]}",
        f"Intended Audience :: {cfg['audience'].title()}",
        f"Natural Language :: {cfg['language'].title()}",
        *(f"Programming Language :: Python :: {v}" for v in pythons[pythons.index(cfg["min_python"]):]),
    ],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    packages=[*find_packages(include=[package, f"{package}.*"]), f"{package}.benchmarks", f"{package}.suites"],
    package_dir={f"{package}.benchmarks": "nbs/benchmarks", f"{package}.suites": "leaderboard/suites"},
    package_data={f"{package}.benchmarks": ["*.ipynb"], f"{package}.suites": ["*.toml"],
                  package: ["py.typed", "bench/site_templates/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    zip_safe=False,
    **{k: cfg[k] for k in "version description keywords author author_email".split()},
)
