"""Progress where there is a terminal."""

from tfmq_fx.base.progress import track


def test_track_yields_everything_in_order(capsys):
    assert list(track([3, 1, 2], "counting")) == [3, 1, 2]
    assert capsys.readouterr().err == ""  # silent where there is no terminal
