"Everything about the package is in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

def lines(key): return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    long_description=(here/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]), include_package_data=True,
    package_data={cfg["lib_name"]: ["assets/**/*"]},
    python_requires=f">={cfg['min_python']}", install_requires=lines("requirements"),
    extras_require={"text": lines("text_requirements"), "s3": lines("s3_requirements"), "gs": lines("gs_requirements"), "onnx": lines("onnx_requirements"), "parquet": lines("parquet_requirements"), "dev": lines("dev_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]},
    classifiers=["License :: OSI Approved :: Apache Software License", "Intended Audience :: Science/Research",
                 "Operating System :: POSIX :: Linux"] + [f"Programming Language :: Python :: 3.{v}" for v in (11, 12, 13)],
    zip_safe=False,
)
