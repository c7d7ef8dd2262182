"""The pack in two folders: ComfyUI starts, loads it once, and says which folder to delete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.comfy import graphs
from tests.comfy.graphs import decode, latent
from tests.comfy.server import PACK, Comfy, install_pack

pytestmark = pytest.mark.comfy


def test_a_zip_and_a_link_beside_the_pack(environment, tmp_path):
    """Three copies: the Registry's, an older zip of GitHub, and a link to the former."""

    def install(custom_nodes: Path) -> Path:
        pack = install_pack(custom_nodes)
        older = custom_nodes / f"{PACK}-main"
        shutil.copytree(pack, older)
        version = older / "wan_vae" / "version.py"
        version.write_text(version.read_text().replace('"0.', '"0.0.'))
        (custom_nodes / "wan-vae").symlink_to(pack, target_is_directory=True)
        return pack

    server = Comfy(environment, tmp_path / "comfy", install=install)
    graphs.write_vaes(server.base / "models" / "vae")
    server.install_probe()
    with server as comfy:
        assert comfy.run(decode(latent(seed=1))).error is None
        scripts = [path for path in comfy.get("/extensions") if path.endswith("/main.js")]
        assert len([path for path in scripts if "an" in path and "ae" in path.lower()]) == 1
        notices = comfy.get("/wan_vae/reports")["notices"]
        log = comfy.log_text()
    folder = server.base / "custom_nodes"
    assert len(notices) == 2 and all(notice in log for notice in notices)
    deleted = {notice.split("Delete ")[1].split(" and keep")[0] for notice in notices}
    assert str(folder / f"{PACK}-main") in deleted, "the older version"
    assert all("installed twice" in notice for notice in notices)
