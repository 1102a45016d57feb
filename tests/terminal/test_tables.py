"""Tables on stdout."""

from fireopd_jax.terminal.tables import table


def test_table_prints_cells_as_they_are(capsys):
    table([["[a]", 0.123456, None], ["b", 2, 3]], ["name", "value", "n"], title="Scores")
    out = capsys.readouterr().out
    assert "Scores" in out and "[a]" in out and "0.1235" in out
    [first] = [line for line in out.splitlines() if "[a]" in line]
    [second] = [line for line in out.splitlines() if "b " in line]
    assert len(first) == len(second)
    # Numbers stand to the right: both end in the same column.
    assert first.index("0.1235") + 6 == second.index(" 2 ") + 2
