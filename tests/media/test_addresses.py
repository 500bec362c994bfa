from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vlm.media.addresses import AllowedAddresses, meant_addresses

PUBLIC = """
    1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0
    168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.0.3.0
    192.88.98.255 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255
    203.0.114.0 223.255.255.255
    2000:: 2001:200::1 2606:4700:4700::1111 2a00:1450:4001:81b::200e 3ffe:: 3fff:1000::1
    ::ffff:8.8.8.8 ::ffff:808:808 64:ff9b::8.8.8.8 2002:808:808::1
"""
NOT_PUBLIC = """
    0.0.0.0 0.0.0.1 0.255.255.255 10.0.0.0 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.0
    127.0.0.1 127.0.0.53 127.255.255.255 168.63.129.16 169.254.0.0 169.254.169.254 169.254.255.255 172.16.0.0
    172.31.255.255 192.0.0.0 192.0.0.192 192.0.0.255 192.0.2.1 192.88.99.1 192.168.0.0 192.168.255.255 198.18.0.0
    198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.0 224.0.0.1 239.255.255.255 240.0.0.0 255.255.255.254
    255.255.255.255
    :: ::1 ::2 ::127.0.0.1 ::8.8.8.8 100::1 fc00::1 fd00:ec2::254 fdff::1 fe80::1 fe80::1%eth0 febf::1 fec0::1 ff02::1
    ff0e::1 1fff:ffff::1 4000::1 5f00::1 2001:: 2001:1::1 2001:10::1 2001:20::1 2001:db8::1 2001:db8:ffff::1 3fff::1
    3fff:fff::1 64:ff9b:1::1 64:ff9b:1::808:808
    ::ffff:127.0.0.1 ::ffff:7f00:1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0 ::ffff:0:127.0.0.1
    64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b::10.1.2.3 2002:7f00:1::1 2002:a9fe:a9fe:: 2002:c0a8:101::1
    2001:0:7f00:1::f7f7:f7f7 2001:0:808:808::80ff:fffe 2001:0:808:808::f5ff:fffe
"""


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses_are_allowed(address):
    assert AllowedAddresses().allows(address)


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_all_others_are_not(address):
    assert not AllowedAddresses().allows(address)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_nothing_is_public_that_the_standard_library_does_not_call_global(address):
    """The library's own table is the reference; it lets some more pass (multicast, parts of 192.0.0.0/24)."""
    if AllowedAddresses().allows(address):
        assert address.is_global
        assert not address.is_multicast
    elif isinstance(address, IPv4Address):
        special = ("192.0.0.", "192.88.99.", "168.63.129.16")
        assert not address.is_global or address.is_multicast or str(address).startswith(special)


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("1.2.3.4", ["1.2.3.4"]),
        ("2606::1", ["2606::1"]),
        ("::ffff:1.2.3.4", ["1.2.3.4"]),
        ("64:ff9b::1.2.3.4", ["1.2.3.4"]),
        ("2002:102:304::5", ["1.2.3.4"]),
        # RFC 4380, section 4: the server as it is, the client's address with all bits turned over.
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", ["65.54.227.120", "192.0.2.45"]),
    ],
)
def test_an_ipv6_address_that_carries_ipv4_means_that(address, meant):
    assert [str(one) for one in meant_addresses(ip_address(address))] == meant


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("127.0.0.0/8", ["127.0.0.1", "127.255.0.9", "::ffff:127.0.0.1", "64:ff9b::7f00:1"], ["10.0.0.1", "::1"]),
        ("10.1.0.0/16", ["10.1.255.255", "2002:a01:203::1"], ["10.2.0.0", "127.0.0.1"]),
        ("192.168.1.7", ["192.168.1.7"], ["192.168.1.8"]),
        ("::1/128", ["::1"], ["127.0.0.1", "::2"]),
        ("fd00::/8", ["fd00:ec2::254"], ["fc00::1", "fe80::1"]),
    ],
)
def test_networks_that_were_named_are_allowed_beside_the_public_ones(network, inside, outside):
    addresses = AllowedAddresses([network])
    assert [address for address in inside if not addresses.allows(address)] == []
    assert [address for address in outside if addresses.allows(address)] == []
    assert addresses.allows("8.8.8.8")


def test_a_relayed_address_must_be_allowed_at_both_ends():
    teredo = "2001:0:808:808::80ff:fffe"  # by way of 8.8.8.8 to 127.0.0.1
    assert meant_addresses(IPv6Address(teredo)) == (IPv4Address("8.8.8.8"), IPv4Address("127.0.0.1"))
    assert AllowedAddresses(["127.0.0.0/8"]).allows(teredo)
    assert not AllowedAddresses(["10.0.0.0/8"]).allows(teredo)


@pytest.mark.parametrize(
    "network", ["10.0.0.1/8", "10.0.0.0/33", "localhost", "", "10.*", "127.1/8", "fe80::1%eth0/64"]
)
def test_a_network_that_is_none_is_named(network):
    with pytest.raises(ValueError, match=r"allowed_media_networks=.*: must be a network") as caught:
        AllowedAddresses(["127.0.0.0/8", network])
    assert repr(network) in str(caught.value)


def test_one_text_is_no_list_of_networks():
    with pytest.raises(ValueError, match="allowed_media_networks='10.0.0.0/8': must be a list"):
        AllowedAddresses("10.0.0.0/8")
