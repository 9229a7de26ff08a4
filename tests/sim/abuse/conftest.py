from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.request_log.disks import small_disk
from tests.sim.abuse.guarded import Guarded, guarded_server

DISK_BYTES = 32 * 2**20


@pytest.fixture(scope="package")
def guarded(llama3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One for all tests of this folder: each must leave it as it was."""
    folder = tmp_path_factory.mktemp("guarded")
    with (
        small_disk(mounted=True, size=DISK_BYTES) as disk,
        guarded_server(llama3_folder, folder, disk) as running,
    ):
        yield running
        assert "Traceback" not in running.server.output
        assert running.server.stop() == 0
        assert running.log.read_bytes().endswith(b"\n")
        assert running.accounts_are_the_logs_sums()
