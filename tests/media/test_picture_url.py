from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vlm.media.addresses import AllowedAddresses
from dist_vlm.media.fetch_error import FetchError
from dist_vlm.media.picture_url import PictureUrls

LOOPBACK_V4 = """
    127.0.0.1 127.0.0.1. 127.1 127.0.1 2130706433 0x7f000001 0X7F000001 0x7f.1 0x7f.0.0.1 0177.0.0.1 017700000001
    0177.1 00000177.0.0.1 127.00000.0.1 127.0.0.0x1 １２７.0.0.1 １２７。０。０。１ ①②⑦.0.0.1 127.0.0.¹
"""
LOOPBACK_V6 = """
    [::1] [0:0:0:0:0:0:0:1] [::0001] [::ffff:127.0.0.1] [::FFFF:7f00:1] [0:0:0:0:0:ffff:127.0.0.1]
    [64:ff9b::127.0.0.1] [64:ff9b::7f00:1] [2002:7f00:1::] [2001:0:7f00:1::1] [::127.0.0.1]
"""


def urls(hosts=None, networks=()):
    return PictureUrls(hosts=hosts, addresses=AllowedAddresses(networks))


def refusal(call, *arguments):
    with pytest.raises(FetchError) as caught:
        call(*arguments)
    assert caught.value.code == "not_allowed"
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "fetched"),
    [
        ("http://good.example", "http://good.example"),
        ("HTTPS://Good.Example:8443/A.png?x=1", "https://good.example:8443/A.png?x=1"),
        ("http://good.example./a", "http://good.example./a"),
        ("http://a_b.good.example/a", "http://a_b.good.example/a"),
        ("http://good.example:1/", "http://good.example:1/"),
        ("http://good.example:65535/", "http://good.example:65535/"),
        # As it is written: a signature may be over these very characters.
        ("http://good.example/a%2Fb/../%7e~?s=%2F+%3D/&t", "http://good.example/a%2Fb/../%7e~?s=%2F+%3D/&t"),
        ("http://good.example/é?ü", "http://good.example/%C3%A9?%C3%BC"),
        ("http://Bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://134744072:81/", "http://8.8.8.8:81/"),
        ("http://0x8.0x8.2056/", "http://8.8.8.8/"),
        ("http://[2606:4700:0:0::1111]:8080/", "http://[2606:4700::1111]:8080/"),
        ("http://good.example/@127.0.0.1", "http://good.example/@127.0.0.1"),
        ("http://good.example?@127.0.0.1/", "http://good.example/?@127.0.0.1/"),
    ],
)
def test_what_is_fetched_is_what_was_written_with_the_host_in_its_one_spelling(text, fetched):
    assert str(urls().check(text)) == fetched


@pytest.mark.parametrize("host", [*LOOPBACK_V4.split(), *LOOPBACK_V6.split()])
def test_loopback_is_refused_however_it_is_spelled(host):
    message = refusal(urls().check, f"http://{host}/a.png")
    assert "an address that is neither public nor allowed here" in message


@pytest.mark.parametrize("host", LOOPBACK_V4.split())
def test_a_spelling_of_an_allowed_address_is_that_address(host):
    assert urls(networks=["127.0.0.0/8"]).check(f"http://{host}:99/").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:///etc/passwd", "the scheme 'file'; only http and https"),
        ("ftp://good.example/a", "the scheme 'ftp'"),
        ("gopher://good.example/a", "the scheme 'gopher'"),
        ("data:image/png;base64,aGk=", "the scheme 'data'"),
        ("javascript:alert(1)", "the scheme 'javascript'"),
        ("unix:///run/docker.sock", "the scheme 'unix'"),
        ("x" * 200 + "://good.example", "scheme 'xxx"),
        ("/etc/passwd", "the scheme ''"),
        ("good.example/a.png", "the scheme ''"),
        ("//good.example/a.png", "the scheme ''"),
        ("", "the scheme ''"),
        ("http:good.example/a", "names no host"),
        ("http:/good.example/a", "names no host"),
        ("http:///a.png", "names no host"),
        ("http://", "names no host"),
        ("http://?a", "names no host"),
        ("http://:80/", "must name a host"),
        ("http://user:secret@good.example/", "a user name or password"),
        ("http://user@good.example/", "a user name or password"),
        ("http://@good.example/", "a user name or password"),
        ("http://good.example:80@127.0.0.1/", "a user name or password"),
        ("http://127.0.0.1:80@good.example/", "a user name or password"),
        ("http://good.example\\@127.0.0.1/", "a backslash"),
        ("http://127.0.0.1\\@good.example/", "a backslash"),
        ("http:\\\\good.example\\a", "a backslash"),
        ("http://good.example/a\\b", "a backslash"),
        ("http://127.0.0.1#@good.example/", "127.0.0.1 is an address that is neither public"),
        ("http://127.0.0.1?@good.example/", "127.0.0.1 is an address that is neither public"),
        (" http://good.example/", "a space"),
        ("http://good.example/a b", "a space"),
        ("http://good.example/\n", "a control character"),
        ("ht\ttp://good.example/", "a control character"),
        ("http://good.example/a\r\nHost: evil", "a control character"),
        ("http://good.example\x00.evil/", "a control character"),
        ("http://good.example/\x7f", "a control character"),
        ("http://good.exam\u00adple/", "a control character"),
        ("http://good\u200b.example/", "a control character"),
        ("http://good.example/\u2028", "a control character"),
        ("http://good.example/\ud800", "a control character"),
        ("http://good.example:0/", "a port from 1 to 65535"),
        ("http://good.example:65536/", "cannot be read|a port from 1 to 65535"),
        ("http://good.example:99999/", "cannot be read|a port from 1 to 65535"),
        ("http://good.example:-1/", "a port from 1 to 65535"),
        ("http://good.example:+80/", "a port from 1 to 65535"),
        ("http://good.example:8_0/", "a port from 1 to 65535"),
        ("http://good.example:/", "a port from 1 to 65535"),
        ("http://good.example:http/", "a port from 1 to 65535"),
        ("http://good.example:80:90/", "a port from 1 to 65535"),
        ("http://[fe80::1%25eth0]/", "must name a host"),
        ("http://[fe80::1%eth0]/", "must name a host"),
        ("http://[::1", "cannot be read"),
        ("http://[]@", "cannot be read"),
        ("http://[]@/", "cannot be read"),
        ("http://::1/", "must name a host"),
        ("http://[::1]good.example/", "cannot be read"),
        ("http://[127.0.0.1]/", "cannot be read"),
        ("http://[v1.good]/", "must name a host"),
        ("http://[12345::1]/", "neither a name nor an address"),
        ("http://good.example%2f.evil/", "must name a host"),
        ("http://%31%32%37.0.0.1/", "must name a host"),
        ("http://good.example;127.0.0.1/", "must name a host"),
        ("http://good..example/", "neither a name nor an address"),
        ("http://.good.example/", "neither a name nor an address"),
        ("http://./", "neither a name nor an address"),
        ("http://" + "a" * 64 + ".example/", "neither a name nor an address"),
        ("http://" + "a." * 127 + "example/", "neither a name nor an address"),
        ("http://1.2.3.4.5/", "neither a name nor an address"),
        ("http://256.1.1.1/", "neither a name nor an address"),
        ("http://4294967296/", "neither a name nor an address"),
        ("http://good.example.09/", "neither a name nor an address"),
        ("http://good.0x7f/", "neither a name nor an address"),
        ("http://good.example/" + "a" * 8192, "8212 characters; at most 8192"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(FetchError, match=message) as caught:
        urls().check(text)
    assert caught.value.code == "not_allowed"
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_longest_url_passes():
    text = "http://good.example/".ljust(8192, "a")
    assert str(urls().check(text)) == text


TOKENS = r"""
    http:// https:// good.example evil.test 127.0.0.1 127.1 [::1] [ ] :: @ \ / // # ? : :80 % %40 %2f . .. ; & é a 1
"""


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["", "good.example", "a.good.example", "good.example:81"]),
    st.lists(st.sampled_from(TOKENS.split()), max_size=6).map("".join),
)
def test_what_passes_is_read_the_same_by_another_parser(head, tail):
    """Two parsers that see different hosts are how allow-lists are passed by: here both see one, and it is allowed."""
    text = "http://" + head + tail
    try:
        url = urls(hosts=["good.example", "*.good.example"]).check(text)
    except FetchError:
        return
    other = urlsplit(text)
    assert other.hostname == url.host
    assert (other.port or {"http": 80, "https": 443}[other.scheme]) == url.port
    assert url.host.removesuffix(".").endswith("good.example")


@pytest.mark.parametrize(
    ("pattern", "listed", "others"),
    [
        ("good.example", ["good.example", "GOOD.example", "good.example."], ["a.good.example", "xgood.example"]),
        ("GOOD.Example.", ["good.example"], ["good.example.evil"]),
        (
            "*.good.example",
            ["a.good.example", "b.A.good.example."],
            ["good.example", "agood.example", "a.good.example.x"],
        ),
        ("bücher.example", ["BÜCHER.example", "xn--bcher-kva.example"], ["bucher.example"]),
        ("*.xn--bcher-kva.example", ["a.bücher.example"], ["bücher.example"]),
        ("8.8.8.8", ["8.8.8.8", "0x08080808"], ["8.8.4.4"]),
        ("0x08080808", ["8.8.8.8"], ["8.8.8.9"]),
        ("2606::1", ["[2606::1]", "[2606:0::1]"], ["[2606::2]"]),
        ("[2606::1]", ["[2606::1]"], ["[2606::2]"]),
    ],
)
def test_only_listed_hosts(pattern, listed, others):
    rules = urls(hosts=["other.example", pattern])
    for host in [*listed, "other.example"]:
        rules.check(f"http://{host}/")
    for host in others:
        assert "is not among the hosts" in refusal(rules.check, f"http://{host}/")


def test_an_empty_list_allows_no_host_and_a_listed_address_must_still_be_allowed():
    assert "not among the hosts" in refusal(urls(hosts=[]).check, "http://good.example/")
    assert "neither public" in refusal(urls(hosts=["127.0.0.1"]).check, "http://127.0.0.1/")


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.", "*.*.example", "a.*.example", "http://good.example", "good.example/a", "good.example:80", "a b"]
    + ["user@good.example", "*good.example", "*.8.8.8.8", "*.1", "256.1.1.1", "[::1", ".good.example"],
)
def test_a_pattern_that_is_none_is_named(pattern):
    with pytest.raises(ValueError, match="allowed_media_hosts=.*must be a host") as caught:
        urls(hosts=["good.example", pattern])
    assert repr(pattern) in str(caught.value)


def test_one_text_is_no_list_of_hosts():
    with pytest.raises(ValueError, match="allowed_media_hosts='good.example': must be a list"):
        urls(hosts="good.example")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("http://b.example/x", "http://b.example/x"),
        ("//b.example/x", "http://b.example/x"),
        ("/x?y", "http://a.example:81/x?y"),
        ("x", "http://a.example:81/d/x"),
        ("../x", "http://a.example:81/x"),
        ("?y=%2F", "http://a.example:81/d/f?y=%2F"),
        ("https://a.example/", "https://a.example/"),
        ("/ü", "http://a.example:81/%C3%BC"),
    ],
)
def test_redirects_lead_where_they_say(location, target):
    rules = urls()
    assert str(rules.check_redirect(rules.check("http://a.example:81/d/f"), location)) == target


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/", "127.0.0.1 is an address that is neither"),
        ("http://127.1/", "127.0.0.1 is an address that is neither"),
        ("//169.254.169.254/latest", "169.254.169.254 is an address that is neither"),
        ("http://u:secret@b.example/", "user name"),
        ("//a.example\\@127.0.0.1/", "backslash"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("data:image/png;base64,aGk=", "scheme 'data'"),
        ("http://c.example/", "c.example is not among"),
        ("/a b", "a space"),
        ("/\udcff", "control character"),
        ("http://b.example:0/", "a port"),
        ("/" + "a" * 8192, "8193 characters"),
    ],
)
def test_redirects_follow_the_same_rules(location, message):
    rules = urls(hosts=["a.example", "b.example", "127.0.0.1", "169.254.169.254"])
    text = refusal(rules.check_redirect, rules.check("http://a.example/"), location)
    assert "http://a.example redirects to a URL that is refused: " in text
    assert message in text
    assert "secret" not in text


@pytest.mark.parametrize("location", ["http://a.example/", "http://b.example/"])
def test_no_redirect_from_https_to_http(location):
    rules = urls()
    assert "from https to http" in refusal(rules.check_redirect, rules.check("https://a.example/"), location)
    assert rules.check_redirect(rules.check("https://a.example/"), "//b.example/").scheme == "https"
