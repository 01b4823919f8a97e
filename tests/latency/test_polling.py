"""Polling is timed with a driver (the stand-in library) and without one."""

import pytest
from fake_gpu import GPU_UUIDS, FakeCuda

from glmlab.latency.measure import LatencyError, clocks
from glmlab.latency.polling import API, NVML, STARTING, SUBPROCESS, measure_polling
from glmlab.memory.probes import MemoryProbe


def test_with_a_driver_all_answer(driver, library, monkeypatch):
    driver.says("gpu 8188 500")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library.parent))  # for the processes of their own
    table = measure_polling(repetitions=1).set_index("way")
    assert table.index.tolist() == [STARTING, SUBPROCESS, API, NVML]
    assert set(table["outcome"]) == {""}
    assert table["fastest_ms"][API] > 100 > table["fastest_ms"][NVML] > 0, "gpustat sleeps 100 ms a GPU"


def test_without_a_driver_only_the_start_of_a_process_has_a_time(driver, monkeypatch):
    monkeypatch.delenv("FAKE_NVML_STATE")
    table = measure_polling(repetitions=1).set_index("way")
    assert table["poll_ms"].notna().tolist() == [True, False, False, False]
    assert table["outcome"].drop(STARTING).str.len().min() > 5


def test_nothing_measured_is_refused():
    with pytest.raises(LatencyError, match="0 repetitions measure nothing"):
        measure_polling(repetitions=0)


class TestClocks:
    def test_clock_and_temperature_as_the_driver_tells(self, driver, monkeypatch):
        driver.says("gpu 8188 500")
        FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
        assert clocks(MemoryProbe("cuda:0")) == [
            {"index": 0, "name": "Fake GPU", "sm_clock_mhz": 1500, "temperature_c": 40}
        ]

    def test_a_driver_that_went_away_is_a_reason_not_an_error(self, driver, monkeypatch):
        driver.says("gpu 8188 500")
        FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
        probe = MemoryProbe("cuda:0")
        driver.goes_away()
        assert "does not answer while reading clocks" in clocks(probe)

    def test_without_a_gpu_there_are_none(self):
        assert clocks(MemoryProbe("cpu")) == []
