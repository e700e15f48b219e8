"""`vlm report`: writes the page, says where, and refuses what is no run."""

import json

from vlm.cli.main import main


def make_run(root):
    root.mkdir()
    (root / "preset.toml").write_text('schema = 1\n[method]\nkey = "tiny"\ntitle = "A tiny run"\n')
    (root / "metrics.jsonl").write_text(
        '{"step": 1, "time": 1.5, "train/loss": 2.5}\n{"step": 2, "time": 3.0, "train/loss": 1.5}\n'
    )
    return root


def test_report_is_written_beside_the_run_or_where_asked(tmp_path, capsys):
    root = make_run(tmp_path / "run")
    assert main(["report", str(root)]) == 0
    assert capsys.readouterr().out.strip() == str(root / "report.html")
    assert "A tiny run" in (root / "report.html").read_text()
    assert main(["report", str(root), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()


def test_json_is_one_object_with_the_runs_numbers(tmp_path, capsys):
    root = make_run(tmp_path / "run")
    assert main(["report", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(root / "report.html")
    assert (found["preset"], found["steps"], found["seconds"]) == ("tiny", 2, 3.0)
    assert found["last"] == {"train/loss": 1.5}
    assert found["finished"] is False


def test_what_is_no_run_is_exit_3(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 3
    assert "is no run" in capsys.readouterr().err


def test_an_output_that_is_a_directory_is_a_wrong_request(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    assert main(["report", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "is a directory, expected a file" in capsys.readouterr().err
