"""What an endpoint is, where it may lead, and that no secret is repeated."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from lorasmith.endpoints import check_addresses, check_endpoint, kind_of, parse_endpoint, read_key
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.teachers import Reach

LOCAL = Reach(loopback=True)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://api.example.com/v1/", "https://api.example.com/v1"),
        ("https://API.example.com:443/v1/chat/completions", "https://api.example.com/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_endpoint_is_parsed_once_and_rebuilt_from_its_parts(text: str, url: str) -> None:
    assert parse_endpoint(text).url == url


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://example.com", "must begin with https:// or http://, got 'ftp'"),
        ("example.com/v1", "must begin with https://"),
        ("https://user:hunter2@example.com/v1", "no user name, password, query or fragment"),
        ("https://example.com/v1?key=hunter2", "no user name, password, query or fragment"),
        ("https://example.com/v1#hunter2", "no user name, password, query or fragment"),
        ("https://example.com\\@169.254.169.254/", "no spaces, backslashes"),
        ("https://exam ple.com/", "no spaces, backslashes"),
        ("https://exämple.com/", "outside ASCII"),
        ("https://example.com:99999/", "is not a URL"),
        ("https://[::1%25eth0]/v1", "no valid host"),
        ("https:///v1", "no valid host"),
        ("https://-x-/v1", "no valid host"),
    ],
)
def test_a_strange_endpoint_is_refused_and_no_secret_repeated(text: str, said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_endpoint(text)
    assert said in caught.value.message
    assert "hunter2" not in caught.value.message + str(caught.value.hint)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("93.184.216.34", "public"),
        ("2606:2800:220:1:248:1893:25c8:1946", "public"),
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.0.0.7", "private"),
        ("172.16.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),  # carrier-grade NAT, neither private nor global to ipaddress
        ("fd12::1", "private"),
        ("::ffff:10.0.0.7", "private"),
        ("2002:0a00:0007::1", "private"),  # 6to4 of 10.0.0.7
        ("64:ff9b::a00:7", "private"),  # NAT64 of 10.0.0.7
        ("169.254.169.254", "forbidden"),
        ("169.254.0.1", "forbidden"),
        ("::ffff:169.254.169.254", "forbidden"),
        ("64:ff9b::a9fe:a9fe", "forbidden"),
        ("2002:a9fe:a9fe::1", "forbidden"),
        ("fe80::1", "forbidden"),
        ("fd00:ec2::254", "forbidden"),
        ("100.100.100.200", "forbidden"),
        ("168.63.129.16", "forbidden"),
        ("0.0.0.0", "forbidden"),
        ("0.0.0.1", "forbidden"),
        ("::", "forbidden"),
        ("224.0.0.1", "forbidden"),
        ("240.0.0.1", "forbidden"),
        ("255.255.255.255", "forbidden"),
        ("ff02::1", "forbidden"),
        ("::127.0.0.1", "forbidden"),  # IPv4-compatible, a form that nothing uses
    ],
)
def test_every_address_has_a_kind(address: str, kind: str) -> None:
    assert kind_of(ip_address(address)) == kind


@pytest.mark.parametrize(
    ("url", "addresses", "reach", "said"),
    [
        ("https://a.test/v1", ["169.254.169.254"], Reach(loopback=True, private=True), "which is never asked"),
        ("https://a.test/v1", ["10.0.0.7"], LOCAL, "an address of a private network"),
        ("https://a.test/v1", ["93.184.216.34", "10.0.0.7"], LOCAL, "an address of a private network"),
        ("https://a.test/v1", ["127.0.0.1"], Reach(), "which is this machine itself"),
        ("http://a.test/v1", ["93.184.216.34"], Reach(loopback=True, private=True), "unencrypted"),
    ],
)
def test_a_host_is_refused_for_any_of_its_addresses(url: str, addresses: list[str], reach: Reach, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        check_addresses(parse_endpoint(url), addresses, reach)


def test_what_is_allowed_is_allowed() -> None:
    check_addresses(parse_endpoint("https://a.test/v1"), ["93.184.216.34"], Reach())
    check_addresses(parse_endpoint("http://a.test/v1"), ["10.0.0.7"], Reach(private=True))
    check_addresses(parse_endpoint("http://localhost:1/v1"), ["127.0.0.1", "::1"], LOCAL)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_other_spellings_of_this_machine_are_this_machine(host: str) -> None:
    with pytest.raises(InvalidSpec, match="this machine itself"):
        check_endpoint(parse_endpoint(f"http://{host}:9/v1"), Reach())


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("TEACHER_KEY", None, "TEACHER_KEY, which should hold the key, is not set"),
        ("TEACHER_KEY", " ", "is not set"),
        ("TEACHER_KEY", "two words of a key", "holds no key"),
        ("TEACHER_KEY", "schlüssel-lang", "holds no key"),
        ("TEACHER_KEY", "abc", "holds no key"),
        ("sk-live-hunter2", None, "takes the name of an environment variable"),
        ("hf_hunter2", None, "takes the name of an environment variable"),
    ],
)
def test_a_key_comes_from_a_variable_and_is_not_repeated(variable: str, value: str | None, said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_key(variable, {} if value is None else {variable: value})
    assert said in caught.value.message
    assert "hunter2" not in caught.value.message
    assert value is None or not value.strip() or value not in caught.value.message


def test_no_key_is_asked_for_where_no_variable_is_named() -> None:
    assert read_key(None, {"OPENAI_API_KEY": "secret-secret"}) is None
    assert read_key("OPENAI_API_KEY", {"OPENAI_API_KEY": "secret-secret\n"}) == "secret-secret"
