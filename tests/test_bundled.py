"""What docs/production.md says of TorchServe's own parts, looked up in the installed ones."""

import re
import zipfile
from pathlib import Path

import pytest
import ts
from conftest import ROOT

PAGE = (ROOT / "docs" / "production.md").read_text()
REST = "org/pytorch/serve/http/api/rest/InferenceRequestHandler.class"


@pytest.fixture(scope="module")
def jar():
    with zipfile.ZipFile(Path(ts.__file__).parent / "frontend" / "model-server.jar") as opened:
        yield opened


def test_the_page_is_about_the_versions_that_are_installed(jar):
    assert f"TorchServe {ts.__version__}" in PAGE
    versions = set(re.findall(rb"netty-codec-http\.version=(\S+)\.Final", jar.read("META-INF/io.netty.versions.properties")))
    assert versions == {re.findall(r"netty (4\.[\d.]+\d)", PAGE)[0].encode()}


def test_forms_are_read_by_nettys_decoder_with_the_requests_limit(jar):
    names = jar.read(REST)
    assert all(word in names for word in (b"multipart/HttpPostRequestDecoder", b"DefaultHttpDataFactory", b"getMaxRequestSize"))


def test_no_native_tls_is_bundled_for_rest(jar):
    native = [name for name in jar.namelist() if name.startswith("META-INF/native/") and "tcnative" in name]
    assert native and all("io_grpc_netty_shaded" in name for name in native)  # gRPC's own
    assert not [name for name in jar.namelist() if name.startswith("io/netty/internal/tcnative/")]


def test_yaml_runs_no_code(jar):
    assert "org/yaml/snakeyaml/inspector/UnTrustedTagInspector.class" in jar.namelist()


def test_relative_urls_are_refused(jar):
    assert b"Relative path is not allowed in url" in jar.read("org/pytorch/serve/archive/model/ModelArchive.class")


def test_the_variable_of_the_keys_time_is_the_one_that_is_told(jar):
    """TorchServe reads the variables that are called as fields of its configuration are."""
    fields = jar.read("org/pytorch/serve/util/ConfigManager.class")
    assert b"TS_TOKEN_EXPIRATION_TIME_MIN" in fields and b"TS_TOKEN_EXPIRATION_MIN" not in fields
    assert "TS_TOKEN_EXPIRATION_TIME_MIN" in PAGE and "TS_TOKEN_EXPIRATION_TIME_MIN" in (ROOT / "deploy/Dockerfile").read_text()
