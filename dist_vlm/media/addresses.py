"""Which network addresses pictures may be fetched from: public ones, and those of networks that the operator named."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address

# Written out, since `is_global` of the standard library changes its answers with Python's version.
_NOT_PUBLIC_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a carrier's NAT; some clouds keep their metadata here
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # public by number, but Azure answers to its machines' agents here
        "169.254.0.0/16",  # link-local; the metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4, withdrawn
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# All IPv6 addresses that are routed to one receiver lie here; loopback, fc00::/7, fe80::/10 and the like do not.
_UNICAST_V6 = IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")


class AllowedAddresses:
    """Public unicast addresses and those inside `networks`, as "10.0.0.0/8" or "fd00::/8"."""

    def __init__(self, networks: Sequence[str] = ()) -> None:
        """Raises `ValueError` for a network that is none."""
        if isinstance(networks, str):
            raise ValueError(f"allowed_media_networks={networks!r}: must be a list of networks, as ['10.0.0.0/8']")
        self._networks = tuple(_network(text) for text in networks)

    def allows(self, address: Address | str) -> bool:
        """Whether a connection to `address` may be made, by where it ends: see `meant_addresses`.

        Raises `ValueError` for text that is no address.
        """
        address = ip_address(address) if isinstance(address, str) else address
        return self._names(address) or all(_is_public(one) or self._names(one) for one in meant_addresses(address))

    def _names(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def meant_addresses(address: Address) -> tuple[Address, ...]:
    """Where packets to `address` go: the IPv4 addresses inside an IPv6 address that carries some, else itself."""
    if isinstance(address, IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo  # the server that relays, the client behind it
    return (address,)


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    return address in _UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def _network(text: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(text)
    except ValueError:
        problem = "must be a network, as 10.0.0.0/8 or fd00::/8, with no bits set behind its prefix"
        raise ValueError(f"allowed_media_networks={text!r}: {problem}") from None
