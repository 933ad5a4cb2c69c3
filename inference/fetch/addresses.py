"""Checks that IP addresses are public, and resolves host names with a timeout."""

import ipaddress
import os
import queue
import socket
import threading
import time
from dataclasses import dataclass, field

POLL_SECONDS = 1.0  # no call blocks for longer, so that a cancellation is noticed
_RESOLVERS = 4  # threads; a name server that does not answer blocks one for up to a minute

# The blocks that the IANA IPv4 and IPv6 Special-Purpose Address Registries list as not globally
# reachable (RFC 6890, RFC 8190), multicast (RFC 5771), and blocks that are deprecated. Our own
# copy: the table of Python's `ipaddress` differs between Python versions.
# https://www.iana.org/assignments/iana-ipv4-special-registry
# https://www.iana.org/assignments/iana-ipv6-special-registry
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private use
        "100.64.0.0/10",  # shared address space of providers
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; metadata services of clouds
        "172.16.0.0/12",  # private use
        "192.0.0.0/24",  # protocol assignments, with two anycast addresses that serve no files
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays, deprecated
        "192.168.0.0/16",  # private use
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and limited broadcast
    )
)
# Of IPv6 only 2000::/3 is global unicast; the rest is loopback, unique local (fc00::/7),
# link-local (fe80::/10), site-local (fec0::/10), multicast (ff00::/8), IPv4-compatible (::/96),
# local NAT64 (64:ff9b:1::/48), discard-only (100::/64), SRv6 (5f00::/16) or not assigned.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID and others
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, deprecated: an IPv4 address that the relay connects to
        "3fff::/20",  # documentation
    )
)
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")  # IPv4 as IPv6
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 behind the well-known prefix, RFC 6052
_ISATAP = 0x00005EFE  # the first half of an ISATAP interface identifier, RFC 5214
_ISATAP_UNIVERSAL = 0x02005EFE


def is_public(address: str) -> bool:
    """Whether an IP address is globally reachable, an IPv4 address inside an IPv6 one included."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in block for block in _NOT_PUBLIC_V4)
    inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip in _MAPPED or ip in _NAT64:
        return is_public(str(inner))
    if int(ip) >> 32 & 0xFFFFFFFF in (_ISATAP, _ISATAP_UNIVERSAL) and not is_public(str(inner)):
        return False
    return ip in _GLOBAL_V6 and not any(ip in block for block in _NOT_PUBLIC_V6)


@dataclass
class _Question:
    host: str
    port: int
    answer: "queue.SimpleQueue[list[str] | Exception]" = field(default_factory=queue.SimpleQueue)


_questions: "queue.SimpleQueue[_Question]"


def look_up(host: str, port: int, seconds: float) -> list[str]:
    """The addresses of a host by the system's resolver.

    Raises OSError; TimeoutError after `seconds`.
    """
    question = _Question(host, port)
    _questions.put(question)
    end = time.monotonic() + seconds
    while True:
        try:
            answer = question.answer.get(timeout=min(POLL_SECONDS, max(end - time.monotonic(), 0)))
        except queue.Empty:
            if time.monotonic() >= end:
                raise TimeoutError("the name server did not answer in time") from None
            continue
        if isinstance(answer, Exception):
            raise OSError(f"{host} has no address ({answer})")
        return answer


def _resolve(questions: "queue.SimpleQueue[_Question]") -> None:
    while True:
        asked = questions.get()
        try:
            found = socket.getaddrinfo(asked.host, asked.port, type=socket.SOCK_STREAM)
            asked.answer.put(list(dict.fromkeys(str(address[0]) for *_, address in found)))
        except Exception as error:  # a label that is too long is a UnicodeError
            asked.answer.put(error)


def _start() -> None:
    """Starts the threads. `getaddrinfo` has no timeout and cannot be interrupted.

    Called at import: a cancellation that is raised while a thread is started would be lost.
    """
    global _questions
    _questions = queue.SimpleQueue()
    for _ in range(_RESOLVERS):
        thread = threading.Thread(target=_resolve, args=(_questions,), daemon=True)
        thread.name = "zeroprior-resolver"
        thread.start()


_start()
os.register_at_fork(after_in_child=_start)
