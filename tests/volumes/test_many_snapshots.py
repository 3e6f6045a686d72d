"""Lists of very many snapshots: whole, sorted, and a page costs its own records, not all of them."""

import time
from dataclasses import replace

import pytest
from bench import make_bench

from csi_driver.config import HostPathPool
from csi_driver.volumes.handles import SNAPSHOT
from csi_driver.volumes.requests import Page

pytestmark = [pytest.mark.minutes, pytest.mark.root]

MANY, PAGE = 10_000, 100


def test_a_page_of_10000_snapshots_reads_its_own_records_only(tmp_path, make_disk):
    bench = make_bench(tmp_path, (HostPathPool("default", make_disk("memory", "256M") / "pool"),))  # tmpfs: fsync costs nothing
    sources = [bench.create(f"source-{number}") for number in range(10)]
    first = [bench.snapshot(f"first-{source.record.name}", source).record for source in sources]
    store = bench.pool()
    for number in range(MANY - len(first)):
        name = f"snapshot-{number}"
        record_id = store.id_of(SNAPSHOT, name)
        store.snapshots.add(replace(first[number % 10], id=record_id, handle=store.handle_of(record_id), name=name))
    everything, slowest, token = [], 0.0, ""
    while True:
        began = time.perf_counter()
        entries, token = bench.snapshots.list(Page(PAGE, token), "", "")
        slowest = max(slowest, time.perf_counter() - began)
        everything += [entry.record.handle for entry in entries]
        if not token:
            break
    assert everything == sorted(everything)
    assert len(set(everything)) == MANY
    began = time.perf_counter()
    assert len(bench.snapshots.list(Page(), "", "")[0]) == MANY
    whole = time.perf_counter() - began
    read: list[str] = []
    original = store.snapshots._read
    store.snapshots._read = lambda folder, record_id: read.append(record_id) or original(folder, record_id)
    bench.snapshots.list(Page(PAGE, ""), "", "")
    assert PAGE < len(read) <= PAGE + 128  # a page, and what is read ahead of it
    store.snapshots._read = original
    began = time.perf_counter()
    for handle in everything[:: MANY // 50]:
        assert [each.record.handle for each in bench.snapshots.list(Page(), handle, "")[0]] == [handle]
    single = (time.perf_counter() - began) / 50
    mine = bench.snapshots.list(Page(), "", sources[0].record.handle)[0]
    print(
        f"{MANY} snapshots: slowest page of {PAGE} {slowest * 1000:.1f} ms, all in one {whole * 1000:.0f} ms, one by its id {single * 1000:.2f} ms"
    )
    assert len(mine) == MANY // 10
    assert {entry.record.source_handle for entry in mine} == {sources[0].record.handle}
