"""A lost screen: whoever reads standard output may end, and the disk it lies on may be full."""

import os
import subprocess
import sys

import pytest

PRINTS = (
    "import sys\n"
    "from senano_jax.errors import one_line_errors\n"
    "with one_line_errors(prints_result=sys.argv[1] == 'result'):\n"
    "    for line in range(20_000):\n"
    "        print(line)\n"
    "    print('±…é', 'done', file=sys.stderr)\n"
)


def printing(what, output, **environment):
    """Status and standard error of a program that prints 100 KB and then says that it is done."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS, what],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        encoding="ascii",
        env=os.environ | {"PYTHONIOENCODING": "ascii"} | environment,
    )
    if process.stdout is not None:
        process.stdout.readline()
        process.stdout.close()
    return process.wait(timeout=60), process.stderr.read()


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_ends_does_not_end_the_program(buffering):
    status, said = printing("result", subprocess.PIPE, PYTHONUNBUFFERED=buffering)
    assert status == 0 and said == "\\xb1\\u2026\\xe9 done\n"
    status, said = printing("progress", subprocess.PIPE, PYTHONUNBUFFERED=buffering)
    assert status == 0 and said.splitlines()[0] == "standard output is lost (Broken pipe); going on without it"


def test_a_full_disk_is_an_error_where_it_takes_the_result():
    with open("/dev/full", "w") as full:
        status, said = printing("result", full)
        assert status == 2
        assert said.splitlines()[1:] == [
            "error: standard output cannot be written (No space left on device); make room and repeat"
        ]
        status, said = printing("progress", full)
        assert status == 0 and "(No space left on device); going on without it" in said


def test_closed_streams_are_no_files_of_the_program(tmp_path):
    """Whatever is opened first would get their numbers, and the prints of libraries with it."""
    script = (
        "import os, sys\n"
        "from senano_jax.errors import one_line_errors\n"
        "with one_line_errors():\n"
        "    print('x'); print('y', file=sys.stderr)\n"
        "    assert open(sys.argv[1], 'w').fileno() > 2\n"
        "    os.write(1, b'of a library')\n"
    )
    command = f'"{sys.executable}" -c "$0" "$1" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, script, tmp_path / "file"], timeout=60).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_what_an_encoding_lacks_is_spelt_out():
    script = "from senano_jax.errors import one_line_errors\nwith one_line_errors(): print('± … é 東 \\udce9')"

    def printed(encoding):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60).stdout

    assert printed("ascii") == rb"+- ... \xe9 \u6771 \udce9" + b"\n"
    assert printed("latin-1") == b"\xb1 ... \xe9 \\u6771 \\udce9\n"
    assert printed("utf-8") == "± … é 東 \\udce9\n".encode()
