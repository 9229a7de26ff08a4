"""Which files make a certificate, and what a changed pair does."""

import os
import ssl
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

from ochat_serve.errors import StartupError
from ochat_serve.tls import Certificate
from tests.certificates import Authority, Pair

MISSING = "/no/such.pem"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def opened(pair: Pair) -> Certificate:
    return Certificate(str(pair.certfile), str(pair.keyfile))


def shown(certificate: Certificate, trusted: ssl.SSLContext) -> bytes | None:
    """The certificate that a new client gets: a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusted.wrap_bio(to_client, to_server, server_hostname="localhost")
    server = certificate.context.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return client.getpeercert(binary_form=True)


def test_a_pair_is_shown_to_clients(authority: Authority) -> None:
    pair = authority.issue("a")
    assert shown(opened(pair), authority.context) == pair.der


def test_no_old_protocol_and_no_old_cipher(authority: Authority) -> None:
    context = opened(authority.issue("a")).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    names = [cipher["name"] for cipher in context.get_ciphers()]
    assert names
    for name in names:
        assert name.startswith(("TLS_", "ECDHE-")), name
        assert "GCM" in name or "CHACHA20" in name, name


def test_what_is_wrong_with_the_files_is_one_sentence(authority: Authority) -> None:
    a, b = authority.issue("a"), authority.issue("b")
    encrypted = authority.issue("c", BestAvailableEncryption(b"x"))
    cut = a.certfile.with_name("cut.pem")
    cut.write_text(a.certfile.read_text()[:200])
    wrong = [
        (MISSING, a.keyfile, f"--ssl-certfile {MISSING} cannot be read: No such file"),
        (a.certfile, MISSING, f"--ssl-keyfile {MISSING} cannot be read: No such file"),
        (a.certfile.parent, a.keyfile, "cannot be read: Is a directory."),
        (a.keyfile, a.keyfile, f"--ssl-certfile {a.keyfile} holds no certificate"),
        (a.certfile, a.certfile, f"--ssl-keyfile {a.certfile} holds no private key"),
        (a.certfile, b.keyfile, f"--ssl-keyfile {b.keyfile} do not belong together."),
        (cut, a.keyfile, "cannot be used: "),
        (encrypted.certfile, encrypted.keyfile, "--ssl-keyfile has a passphrase"),
    ]
    for certfile, keyfile, said in wrong:
        with pytest.raises(StartupError) as refusal:
            Certificate(str(certfile), str(keyfile))
        assert said in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_changed_pair_is_taken_when_it_lies_still(authority: Authority) -> None:
    pair, new = authority.issue("a"), authority.issue("b")
    certificate = opened(pair)
    assert certificate.refresh() is None
    pair.replace_with(new)
    assert certificate.refresh() is None, "it may still be being written"
    assert certificate.refresh() == "the new certificate is in use"
    assert shown(certificate, authority.context) == new.der
    assert certificate.refresh() is None


def test_a_changed_pair_is_taken_at_once_if_that_is_asked_for(authority: Authority) -> None:
    pair, new = authority.issue("a"), authority.issue("b")
    certificate = opened(pair)
    assert certificate.refresh(at_once=True) is None
    pair.replace_with(new)
    assert certificate.refresh(at_once=True) == "the new certificate is in use"
    assert shown(certificate, authority.context) == new.der


def test_links_are_followed(authority: Authority, tmp_path: Path) -> None:
    """certbot's names are links to files that never change."""
    a, b = authority.issue("a"), authority.issue("b")
    links = Pair(tmp_path / "fullchain.pem", tmp_path / "privkey.pem")
    for link, target in ((links.certfile, a.certfile), (links.keyfile, a.keyfile)):
        link.symlink_to(target)
    certificate = opened(links)
    for link, target in ((links.certfile, b.certfile), (links.keyfile, b.keyfile)):
        link.unlink()
        link.symlink_to(target)
    certificate.refresh()
    assert certificate.refresh() is not None
    assert shown(certificate, authority.context) == b.der


def broken(pair: Pair, new: Pair, how: str) -> None:
    if how == "half":
        pair.replace_with(new)
        pair.certfile.write_bytes(new.certfile.read_bytes()[:300])
    elif how == "mixed":
        pair.certfile.write_bytes(new.certfile.read_bytes())
    elif how == "empty":
        pair.keyfile.write_bytes(b"")
    elif how == "gone":
        pair.keyfile.unlink()


@pytest.mark.parametrize("how", ["half", "mixed", "empty", "gone"])
def test_a_broken_pair_leaves_the_old_one_in_use(authority: Authority, how: str) -> None:
    """It is told once, tried again until it fits, and told again if it breaks again."""
    pair, new = authority.issue("a"), authority.issue("b")
    old = pair.der
    certificate = opened(pair)
    broken(pair, new, how)
    told = [certificate.refresh() for _ in range(5)]
    assert [sentence is None for sentence in told] == [True, False, True, True, True]
    assert "stays in use" in str(told[1])
    assert shown(certificate, authority.context) == old
    pair.replace_with(new)
    assert [certificate.refresh() for _ in range(3)] == [
        None,
        "the new certificate is in use",
        None,
    ]
    assert shown(certificate, authority.context) == new.der
    pair.keyfile.write_bytes(b"")
    told = [certificate.refresh() for _ in range(3)]
    assert [sentence is None for sentence in told] == [True, False, True]


def test_the_old_file_put_back_is_the_end_of_a_trouble(authority: Authority) -> None:
    pair = authority.issue("a")
    certificate = opened(pair)
    aside = pair.keyfile.with_suffix(".aside")
    for _ in range(2):
        pair.keyfile.rename(aside)
        told = [certificate.refresh() for _ in range(3)]
        assert [sentence is None for sentence in told] == [True, False, True]
        aside.rename(pair.keyfile)
        assert [certificate.refresh() for _ in range(3)] == [None] * 3


def test_what_fails_is_tried_again_even_if_nothing_seems_to_change(authority: Authority) -> None:
    """A file that becomes readable keeps its size and time."""
    pair, new = authority.issue("a"), authority.issue("b")
    certificate = opened(pair)
    pair.replace_with(new)
    key = pair.keyfile.read_bytes()
    pair.keyfile.write_bytes(b"x" * len(key))
    seen = pair.keyfile.stat()
    assert "no private key" in str([certificate.refresh() for _ in range(3)])
    pair.keyfile.write_bytes(key)
    os.utime(pair.keyfile, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert certificate.refresh() == "the new certificate is in use"
