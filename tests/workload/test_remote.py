"""Reading a workload that is elsewhere: through URLs, file systems, a web server and the client of an object store."""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_read import patterns

import sparsetrace
from sparsetrace.core.files import InputError


@pytest.mark.parametrize("kind", ["file", "memory", "filesystem"])
def test_urls_and_file_systems(half, kind):
    import fsspec
    import pyarrow.fs as pafs

    if kind == "file":
        ds = sparsetrace.open(half.workload.as_uri())
    elif kind == "filesystem":
        ds = sparsetrace.open("workload", filesystem=pafs.SubTreeFileSystem(str(half.folder), pafs.LocalFileSystem()))
    else:
        memory = fsspec.filesystem("memory")
        memory.put(str(half.workload), "/moved", recursive=True)
        ds = sparsetrace.open("memory://moved")
    assert np.array_equal(patterns(half, ds.matrix(1, "gate").dense()), half.dense[1, "gate"])


class Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files, which Python's own handler does not."""

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return super().do_GET()
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        first, last = int(wanted[1]), min(int(wanted[2]), path.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(path.read_bytes()[first : last + 1])

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def address(half):
    """Host and port of a server whose `/workload` is the workload."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(half.folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=["http", "s3"])
def served(request, address):
    """URL of the workload, read by fsspec's web client or by Arrow's client of object stores, which asks alike."""
    if request.param == "http":
        return f"http://{address}/workload"
    options = f"scheme=http&region=nowhere&endpoint_override={address.replace(':', '%3A')}"
    return f"s3://someone:secret@workload?{options}"


def test_a_server(half, served):
    ds = sparsetrace.open(served)
    assert np.array_equal(patterns(half, ds.matrix(1, "gate").dense()), half.dense[1, "gate"])
    assert np.array_equal(patterns(half, ds[0, "q", half.tokens[3]]), half.dense[0, "q"][3])
    assert "secret" not in repr(ds)


def test_a_server_without_the_file(served):
    with pytest.raises(InputError, match="none/manifest.json must be a file, got nothing there") as error:
        sparsetrace.open(served.replace("workload", "none"))
    assert "secret" not in str(error.value)
