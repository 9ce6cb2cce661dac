"""Progress of long passes, said in the log."""

import logging

from kitae.train import progress


def test_a_long_pass_says_how_far_it_is_and_how_long_it_takes(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    tick = progress.Ticker("rows rendered", total=400)
    for done in range(0, 400, 100):
        tick(done)
        now[0] += 12.0
    assert [r.getMessage() for r in caplog.records] == [
        "100 of 400 rows rendered, 36 s left",
        "200 of 400 rows rendered, 24 s left",
        "300 of 400 rows rendered, 12 s left",
    ]


def test_a_short_pass_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    tick = progress.Ticker("rows read")
    for done in range(1000):
        tick(done)
    assert not caplog.records
