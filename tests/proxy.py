"""nginx with the configuration of deploy/nginx, started in front of a server of the tests."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
from conftest import ROOT

TOKEN = "3f" * 32  # a client's, as tokens.map holds it
CLIENT = {"Authorization": f"Bearer {TOKEN}"}


def certificate(folder: Path, name: str = "tls", issuer: str | None = None) -> None:
    """Write NAME.crt and NAME.key of the host localhost, by itself or by an issuer of the same folder."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += [
        "-subj",
        f"/CN={'localhost' if issuer is None else name}",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]
    command += ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.crt"]
    command += ["-CA", f"{folder}/{issuer}.crt", "-CAkey", f"{folder}/{issuer}.key"] if issuer else []
    subprocess.run(command, check=True, capture_output=True)


def rendered(folder: Path, listen: int, upstream: str) -> Path:
    """Copy deploy/nginx, with ports and a folder to write to of its own; nothing else is changed."""
    conf, write = folder / "conf", folder / "write"
    shutil.copytree(ROOT / "deploy" / "nginx", conf)
    for name in ("tls", "tokens"):
        (conf / name).mkdir(exist_ok=True)
    write.mkdir()
    certificate(conf / "tls")
    (conf / "tokens" / "tokens.map").write_text(f'"Bearer {TOKEN}" team-a;\n')
    for path in conf.glob("*.conf"):
        text = path.read_text().replace("/tmp/", f"{write}/").replace("127.0.0.1:8080", upstream)
        path.write_text(text.replace("listen 8443", f"listen 127.0.0.1:{listen}").replace("/dev/stdout", f"{write}/access.log"))
    if os.getuid() == 0:  # its workers would be nobody, who cannot enter a test's folder
        path = conf / "nginx.conf"
        path.write_text("user root;\n" + path.read_text())
    return conf


@contextmanager
def proxied(folder: Path, listen: int, upstream: str, keys: Path):
    """Run deploy/nginx/start.sh in front of `upstream` (host:port) and yield the address to ask."""
    conf = rendered(folder, listen, upstream)
    log = folder / "proxy.log"
    with log.open("wb") as output:
        command = ["sh", str(conf / "start.sh"), str(conf), str(keys), str(folder / "write")]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: answers(f"https://127.0.0.1:{listen}/", conf), log)
        yield f"https://127.0.0.1:{listen}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def answers(url: str, conf: Path) -> bool:
    try:
        return httpx.get(url, verify=False, timeout=5).status_code == 404
    except httpx.TransportError:
        return False


def wait_for(holds, log: Path, seconds: float = 20) -> None:
    """Wait until `holds()`; fails with the log where it never does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"nothing within {seconds} s; {log}:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)
