"""The cluster, a model and its answers, shared by all tests of this folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster
from text_helpers import tiny_model
from weights_helpers import random_weights, write_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit from: the site's file, and a home with the model `tiny`."""
    folder = tmp_path_factory.mktemp("site")
    model = tiny_model(folder / "home" / "models" / "tiny")
    config = json.loads((model / "config.json").read_text())
    write_model(model, config, weights=random_weights(config))
    (folder / "cluster.yaml").write_text(
        f"""\
name: one-node
login_host: login.example.org
environment: {sys.prefix}
scratch: {folder}/scratch
home: {folder}/home
local_scratch: {folder}/local
cpus: 1
memory: 1M
time: "2"
max_time: "30"
sbatch: [--export=ALL]
nodes:
  cpu: {{constraint: big}}
  h100: {{gres: "gpu:h100:1"}}
  h200: {{gres: "gpu:h200:1"}}
"""
    )
    os.environ.setdefault("OCTAVO_NUM_THREADS", "1")
    return folder
