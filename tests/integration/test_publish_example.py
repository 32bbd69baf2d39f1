from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doubles.hub_server import environment_of, serve_hub
from huggingface_hub import ModelCard

EXAMPLE = Path(__file__).parents[2] / "examples" / "publish_and_pull.py"


@pytest.mark.slow
def test_what_one_process_publishes_another_pulls_without_sources_or_credentials(tmp_path: Path) -> None:
    with serve_hub() as hub:

        def run(*arguments: str, cache: str, token: str) -> str:
            environment = {**os.environ, **environment_of(hub, str(tmp_path / cache), token)}
            command = [sys.executable, str(EXAMPLE), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        published = run("publish", "--repo=me/digits", "--random-weights", cache="theirs", token="hf_good")
        commit = re.search(r"commit (\w{40})", published)
        assert commit is not None
        before = len(hub.requests)
        pulled = run("pull", f"--repo=me/digits@{commit[1]}", cache="mine", token="")
        asked = {request.split("/")[-1] for request in hub.requests[before:] if "resolve" in request}
        assert asked == {"config.json", "model.safetensors"}
        accuracies = [re.findall(r"^accuracy (0\.\d{4})$", text, re.MULTILINE) for text in (published, pulled)]
        assert accuracies[0] == accuracies[1]
        assert float(accuracies[0][0]) > 0.5
        files = hub.files("me/digits")
    assert set(files) == {".gitattributes", "README.md", "composition.png", "config.json", "model.safetensors"}
    [result] = ModelCard(files["README.md"].decode()).data.eval_results
    assert (f"{result.metric_value:.4f}", result.dataset_args) == (accuracies[0][0], {"num_images": 897})
