"""Which IP addresses files may be fetched from: a table of our own, tested at both ends of a block.

The blocks are those of the IANA special-purpose address registries.
"""

import ipaddress
import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT

from inference.fetch.addresses import is_public, look_up

NOT_PUBLIC = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    *("::/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64", "5f00::/16"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    *("fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
]
PUBLIC_NEIGHBOURS = [
    *("1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0"),
    *("191.255.255.255", "192.0.1.0", "192.0.1.255", "192.0.3.0", "192.88.98.255", "192.88.100.0"),
    *("192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.99.255"),
    *("198.51.101.0", "203.0.112.255", "203.0.114.0", "223.255.255.255"),
    *("2000::", "2001:200::", "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff", "2001:db9::", "2003::"),
    *("2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "3ffe:ffff::", "3fff:1000::"),
    *("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"),
]
INSIDE = ("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.1.1", "100.64.0.1", "0.0.0.0")


@pytest.mark.parametrize("block", NOT_PUBLIC)
def test_a_special_block_is_not_public_from_its_first_address_to_its_last(block: str) -> None:
    network = ipaddress.ip_network(block)
    middle = network[network.num_addresses // 2]
    assert [is_public(str(each)) for each in (network[0], middle, network[-1])] == [False] * 3


@pytest.mark.parametrize("address", PUBLIC_NEIGHBOURS)
def test_the_addresses_next_to_a_special_block_are_public(address: str) -> None:
    assert is_public(address)


def embedded(inner: str) -> list[str]:
    """The IPv6 forms of an IPv4 address."""
    number = int(ipaddress.IPv4Address(inner))
    high, low = f"{number >> 16:x}", f"{number & 0xFFFF:x}"
    return [
        f"::ffff:{inner}",  # mapped
        f"64:ff9b::{high}:{low}",  # NAT64
        f"2606:2800::5efe:{high}:{low}",  # ISATAP
        f"2606:2800::200:5efe:{high}:{low}",
    ]


@pytest.mark.parametrize("inner", INSIDE)
def test_an_internal_ipv4_address_inside_an_ipv6_address_is_not_public(inner: str) -> None:
    number = int(ipaddress.IPv4Address(inner))
    high, low = f"{number >> 16:x}", f"{number & 0xFFFF:x}"
    teredo = number ^ 0xFFFFFFFF
    forms = [
        *embedded(inner),
        f"::{inner}",  # compatible
        f"64:ff9b:1::{high}:{low}",  # local NAT64
        f"2002:{high}:{low}::1",  # 6to4
        f"2001:0:5db8:d70e::{teredo >> 16:x}:{teredo & 0xFFFF:x}",  # Teredo
        f"::ffff:0:{high}:{low}",  # translated
    ]
    assert [form for form in forms if is_public(form)] == []


def test_a_public_ipv4_address_inside_an_ipv6_address_is_public() -> None:
    assert all(map(is_public, embedded("93.184.215.14")))


def test_a_zone_does_not_hide_an_address() -> None:
    assert not is_public("fe80::1%eth0")


def test_a_name_is_looked_up_and_a_name_that_cannot_be_one_is_an_os_error() -> None:
    assert "127.0.0.1" in look_up("localhost", 443, 10)
    for host in ("a" * 64 + ".example", "a" * 5000, "."):
        with pytest.raises(OSError, match="has no address"):
            look_up(host, 443, 10)


def test_a_name_server_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a process of its own, since the look-up goes on in its thread."""
    code = """
import socket, time
socket.getaddrinfo = lambda *a, **k: time.sleep(3)
from inference.fetch.addresses import look_up
start = time.monotonic()
try:
    look_up("weights.example", 443, 0.3)
except TimeoutError as error:
    assert time.monotonic() - start < 2, error
    print("refused")
"""
    root = ROOT
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, cwd=root, capture_output=True, text=True).stdout == "refused\n"
