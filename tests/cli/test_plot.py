"""Curves drawn as text."""

from kitae.cli._plot import Curve, draw_text, side_by_side


def dots(lines):
    return [[ord(c) - 0x2800 for c in line.split("|")[1]] for line in lines[1:-1]]


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right():
    cells = dots(draw_text(Curve(title="t", points=[(1, 0.0), (10, 1.0)]), width=10, height=4))
    assert cells[-1][0], "the first column is at the bottom"
    assert cells[0][-1], "the last column is at the top"
    assert not cells[0][0]
    assert not cells[-1][-1]


def test_every_column_has_a_dot_and_jumps_are_joined():
    cells = dots(
        draw_text(Curve(title="t", points=[(0, 0.0), (1, 5.0), (2, 0.0), (3, 5.0)]), width=12, height=5)
    )
    assert all(any(row[x] for row in cells) for x in range(12))
    assert all(any(row) for row in cells), "a jump leaves no empty line"


def test_a_constant_and_a_single_point_can_be_drawn():
    assert len(draw_text(Curve(title="t", points=[(1, 2.0), (2, 2.0)]), width=8, height=3)) == 5
    assert len(draw_text(Curve(title="t", points=[(1, 2.0)]), width=8, height=3)) == 5
    assert draw_text(Curve(title="t", points=[])) == ["t", "(no points yet)"]


def test_axes_name_the_extremes():
    lines = draw_text(Curve(title="reward", points=[(1, 0.5), (60, 9.5)]), width=10, height=3)
    assert lines[1].startswith("9.5|")
    assert lines[-2].startswith("0.5|")
    assert lines[-1].split() == ["1", "60"]


def test_two_plots_fit_a_terminal_of_80_columns():
    plot = draw_text(Curve(title="completion length by round", points=[(1, 17.954), (60, 30.432)]))
    assert max(map(len, side_by_side(plot, plot).splitlines())) <= 80
