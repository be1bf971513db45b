"""`make images-save`: files from which a machine without a registry loads the images."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SMALL = "FROM scratch\nLABEL medhive.test={name}\nCOPY LICENSE /\n"
NAMES = ("fl-client", "api-gateway", "fl-server", "mlflow", "proxy")


def docker(*words: str, text: str = "") -> str:
    return subprocess.run(
        ["docker", *words], input=text, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_saved_images_load_again(tmp_path: Path) -> None:
    """With small images in the place of the real ones, whose gigabytes would prove the same."""
    tag, folder = f"save-{os.getpid()}", tmp_path / "images"
    images = {name: f"{name}:{tag}" if name == "fl-client" else f"medhive/{name}:{tag}" for name in NAMES}
    context = tmp_path / "context"
    context.mkdir()
    (context / "LICENSE").write_text("x")
    try:
        for name, image in images.items():
            docker("build", "-q", "-t", image, "-f", "-", str(context), text=SMALL.format(name=name))
        ids = {image: docker("image", "inspect", "--format", "{{.Id}}", image) for image in images.values()}
        environment = {**os.environ, "MEDHIVE_TAG": tag, "MEDHIVE_SITE_IMAGE": images["fl-client"]}
        subprocess.run(["make", "images-save", f"DIR={folder}"], cwd=ROOT, env=environment, check=True)
        docker("image", "rm", *images.values())
        saved = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
        assert len(saved) == len(NAMES)
        for file, digest in saved.items():
            assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
            docker("load", "--input", str(folder / file))
        assert ids == {image: docker("image", "inspect", "--format", "{{.Id}}", image) for image in ids}
        assert not list(folder.glob("*.part"))
    finally:
        subprocess.run(["docker", "image", "rm", *images.values()], capture_output=True, check=False)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "MEDHIVE_SITE_IMAGE": "fl-client:never-built"}
    done = subprocess.run(
        ["make", "images-save", f"DIR={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "there is no image fl-client:never-built; make it with: make images" in done.stderr
    assert not list(tmp_path.iterdir())
