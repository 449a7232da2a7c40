"""Studies in a browser while they run: nobody else reads or orders, and what is asked for reaches the driver."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allocators.core.errors import StudyError
from search.records import LINES, orders, read
from search.records.folder import StudyFolder
from search.records.following import Following
from search.records.orders import Order
from search.serve import Server, Serving, listen
from search.serve.__main__ import _serving, main, parse
from tests.browser import Browser, needs_browser
from tests.search.studies import fill, open_study, outcome, selection, started

EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def studies(tmp_path: Path) -> Iterator[list[StudyFolder]]:
    """Two studies whose drivers are at work: one of many points, one of a single point."""
    with open_study(tmp_path / "many") as many, open_study(tmp_path / "one") as one:
        fill(many)
        one.append_finished(outcome(selection(3), allocator=EVIL), {"allocator": EVIL, "fraction": 0.2})
        one.append_started(started(outcome(selection(5))), {"allocator": "sieve", "fraction": 0.3})
        yield [many, one]


@pytest.fixture
def server(studies: list[StudyFolder]) -> Iterator[Server]:
    yield from serve(Serving([study.folder for study in studies], token="secret"))


def serve(serving: Serving) -> Iterator[Server]:
    server = listen(serving, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def request(server: Server, path: str, *, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, str]:
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    given = {name.replace("_", "-"): value.format(port=port) for name, value in headers.items()}
    text = body if isinstance(body, str) or body is None else json.dumps(body)
    connection.request(method, path, text, given)
    answer = connection.getresponse()
    got = answer.status, answer.read().decode()
    connection.close()
    return got


OURS = {"Origin": "http://127.0.0.1:{port}", "Content_Type": "application/json"}


def test_pages_and_stamps(server: Server, studies: list[StudyFolder]) -> None:
    assert request(server, "/secret/")[0] == 200
    status, page = request(server, "/secret/1/")
    assert status == 200
    assert "<img" not in page
    before = json.loads(request(server, "/secret/1/state")[1])
    assert before["stamp"] in page
    studies[1].append_finished(outcome(selection(5)), {})
    after = json.loads(request(server, "/secret/1/state")[1])
    assert before != after
    assert after["stamp"] in request(server, "/secret/1/")[1]


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {}),
        ("/wrong/", {}),
        ("/secre/", {}),
        ("/secret/2/", {}),
        ("/secret/-1/", {}),
        ("/secret/0000009/", {}),
        ("/secret/0/outcomes.jsonl", {}),
        ("/secret/../study.json", {}),
        ("/secret/%2e%2e/study.json", {}),
        ("/secret/", {"Host": "evil.example:{port}"}),
        ("/secret/0/state", {"Host": "127.0.0.1.evil.example"}),
        ("/secret/0/state", {"Host": "@127.0.0.1@evil.example"}),
    ],
)
def test_nothing_else_is_handed_out(server: Server, path: str, headers: dict[str, str]) -> None:
    status, text = request(server, path, **headers)
    assert status in (404, 421)
    assert len(text) < 100


@pytest.mark.parametrize(
    ("changes", "body", "status"),
    [
        ({}, {"do": "end"}, 200),
        ({"Origin": "http://evil.example"}, {"do": "end"}, 403),
        ({"Origin": "null"}, {"do": "end"}, 403),
        ({"Origin": ""}, {"do": "end"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, {"do": "end"}, 403),
        ({"Content_Type": "text/plain"}, {"do": "end"}, 415),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, {"do": "end"}, 421),
        ({"Content_Length": "99999999"}, {"do": "end"}, 413),
        ({"Content_Length": "-1"}, {"do": "end"}, 413),
        ({}, "no json", 400),
        ({}, {"do": "delete"}, 400),
        ({}, {"do": "stop", "digest": "../../x"}, 400),
        ({}, {"do": "try", "point": {"a": {"b": 1}}}, 400),
        ({}, {"do": "try", "point": {"a": float("inf")}}, 400),
        ({}, "[" * 30_000, 400),
    ],
)
def test_an_order_comes_from_a_page_of_this_server_alone(
    server: Server, studies: list[StudyFolder], changes: dict[str, str], body: Any, status: int
) -> None:
    got, _ = request(server, "/secret/0/order", method="POST", body=body, **(OURS | changes))
    assert got == status
    assert orders.take(studies[0].folder) == ([Order("end")] if status == 200 else [])


def test_a_study_without_a_driver_takes_no_order(tmp_path: Path) -> None:
    with open_study(tmp_path / "s") as study:
        study.append_finished(outcome(), {})
    for server in serve(Serving([study.folder], token="secret")):
        assert "No driver is at work" not in request(server, "/secret/")[1].split("<script>")[0]
        status, text = request(server, "/secret/0/order", method="POST", body={"do": "end"}, **OURS)
        assert (status, "no driver is at work" in text) == (409, True)
    assert not (study.folder / "orders").exists()


def test_damaged_folders_are_one_line_and_the_others_are_shown(tmp_path: Path) -> None:
    for name in ("good", "torn", "gone", "half"):
        with open_study(tmp_path / name) as study:
            study.append_finished(outcome(), {})
    (tmp_path / "torn" / "study.json").write_text('{"id": ')
    (tmp_path / "gone" / LINES).unlink()
    with (tmp_path / "half" / LINES).open("a") as file:
        file.write('{"event": "finished", "outcome": {"tri')  # is being written
    folders = [tmp_path / name for name in ("good", "torn", "gone", "half")]
    for server in serve(Serving(folders, token="secret")):
        status, page = request(server, "/secret/")
        assert status == 200
        assert "study.json is damaged" in page
        assert [request(server, f"/secret/{n}/")[0] for n in range(4)] == [200, 409, 409, 200]


def test_orders_are_files_that_are_read_once_and_nothing_else_is_followed(tmp_path: Path) -> None:
    folder, secret = tmp_path / "s", tmp_path / "secret.json"
    secret.write_text('{"do": "end"}')
    folder.mkdir()
    assert orders.take(folder) == []
    given = [Order("stop", digest="0123456789abcdef"), Order("try", point={"fraction": 0.5, "score": "count"})]
    for order in given:
        orders.give(folder, order)
    (folder / "orders" / "0-link.json").symlink_to(secret)
    os.mkfifo(folder / "orders" / "0-pipe.json")
    (folder / "orders" / "0-large.json").write_text('{"do": "end", "x": "' + "x" * orders.LARGEST + '"}')
    (folder / "orders" / "0-folder.json").mkdir()
    (folder / "orders" / ".half.json").write_text('{"do": "end"}')
    assert orders.take(folder) == given
    assert orders.take(folder) == []
    assert secret.exists()
    for _ in range(orders.MOST - 2):
        orders.give(folder, Order("end"))
    with pytest.raises(StudyError, match="orders wait already"):
        orders.give(folder, Order("end"))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "orders").symlink_to(folder / "orders")
    assert orders.take(tmp_path / "t") == []
    with pytest.raises(StudyError, match="leads out of the study folder"):
        orders.give(tmp_path / "t", Order("end"))


def test_on_all_addresses_it_answers_under_each_and_under_its_own_name(studies: list[StudyFolder]) -> None:
    """A number cannot be pointed at this machine by somebody else, and a name can."""
    folders = [study.folder for study in studies]
    for host, name, fits in (
        ("0.0.0.0", socket.gethostname().lower(), ("10.1.2.3", "127.0.0.1", socket.gethostname())),
        ("127.0.0.1", "127.0.0.1", ("127.0.0.1", "localhost")),
        ("10.1.2.3", "10.1.2.3", ("10.1.2.3", "127.0.0.1")),
        ("::1", "[::1]", ("[::1]",)),
    ):
        serving, printed = _serving(folders, host)
        assert printed == name
        for server in serve(serving):
            for asked in ("10.1.2.3", "10.9.9.9", "127.0.0.1", "localhost", "[::1]", "evil.example", name):
                status, _ = request(server, f"/{serving.token}/0/state", Host=f"{asked}:{{port}}")
                allowed = asked in (*fits, name, "127.0.0.1", "localhost", "[::1]")
                assert status == (200 if allowed or (host == "0.0.0.0" and asked[0] == "1") else 421), (host, asked)
    with pytest.raises(StudyError, match="or a host= of this machine"):
        listen(serving, host="192.0.2.1", port=0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([]) == 2
    assert main(["help"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 2
    assert "no study in" in printed.err
    assert "127.0.0.1" in printed.out
    assert parse(["a", "b", "port=0"])[1].host == "127.0.0.1"


@needs_browser
def test_the_page_orders_and_learns_of_results_in_a_browser(server: Server, studies: list[StudyFolder]) -> None:
    root = f"http://127.0.0.1:{server.server_address[1]}/secret/"
    with Browser() as page:
        page.open(root)
        assert page.ask("document.querySelectorAll('path.front').length") == 2
        assert page.ask("document.querySelectorAll('img').length") == 0
        page.open(f"{root}1/")
        under_way = studies[1].in_flight[0][0].digest
        assert under_way[:8] in page.ask("document.body.innerText")
        click = "[...document.querySelectorAll('button')].find(b => b.textContent === '{}').click()"
        page.ask(click.format("Stop"))
        page.wait("document.body.innerText.includes('asked; the driver answers')")
        page.ask("document.getElementById('another').open = true")
        page.ask("document.querySelector('input[aria-label=fraction]').value = '0.625'")
        page.ask(click.format("Try it"))
        page.wait("document.body.innerText.split('asked; the driver answers').length === 3")
        assert page.errors == []
        stop, wanted = orders.take(studies[1].folder)
        assert stop == Order("stop", digest=under_way)
        assert wanted == Order("try", point={"allocator": EVIL, "fraction": 0.625})
        studies[1].append_ordered(wanted, f"refused: {EVIL}")
        studies[1].append_finished(outcome(selection(5), accuracy=0.7), {})
        page.wait("document.querySelectorAll('.dot').length === 2")
        assert "refused: </script>" in page.ask("document.body.innerText")
        assert page.ask("document.querySelectorAll('img').length") == 0
    assert read(studies[1].folder).orders[0].order == wanted


def test_what_is_read_line_by_line_is_what_a_fresh_look_reads(tmp_path: Path) -> None:
    """Torn lines, a study that is opened anew, and one whose lines were taken away, too."""
    with open_study(tmp_path / "s") as study:
        following = Following(study.folder)
        assert not following.read().finished
        fill(study)
        first = following.read()
        assert first.finished == read(study.folder).finished
        lines = study.folder / LINES
        whole = lines.read_bytes()
        lines.write_bytes(whole + b'{"event": "finished", "outcome": {"tri')
        assert following.read() is first
        lines.write_bytes(whole[:-1])  # the last line without its end
        following.read()
        lines.write_bytes(whole)
        assert following.read().problems == first.problems == []
        (study.folder / "untrained.json").write_text('{"accuracy": 0.25, "stderr": 0.02}')
        assert following.read().untrained == {"accuracy": 0.25, "stderr": 0.02}
    with open_study(tmp_path / "s") as study:
        study.append_finished(outcome(selection(5)), {})
        again = following.read()
        assert again is not first
        assert again.finished == read(study.folder).finished
        lines.write_bytes(whole[: len(whole) // 2])
        assert following.read().finished == read(study.folder).finished
