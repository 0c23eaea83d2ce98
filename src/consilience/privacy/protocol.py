"""Secure aggregation in four messages: a server that follows the protocol learns the sum of vectors, and nothing else.

Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth, "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", CCS 2017, for an honest but curious server. Client i sends, modulo 2^k,

    y_i = x_i + PRG(b_i) + sum_{j > i} PRG(s_ij) - sum_{j < i} PRG(s_ij)

with s_ij agreed by X25519, b_i its own seed; b_i and its masking key are shared among all (Shamir), each share
encrypted for its holder. For who has sent y_i the server asks shares of b_i, for who has not, of the masking key;
never both. X25519, HKDF-SHA256 and ChaCha20 are those of ``cryptography``, as is ChaCha20-Poly1305 for shares.
Deviation: keys are not signed, so a server that lies about them is not found out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from consilience.core.errors import ConfigError, ConsilienceError
from consilience.privacy.shamir import SHARE, join, split

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise ConfigError("secure aggregation needs cryptography: pip install 'consilience[secure]'") from None

KEY = 32
SEALED = 16 + 2 * SHARE
"""Bytes of two shares, encrypted."""


class Keys(NamedTuple):
    """A client's public keys: for encryption of shares, and for masks."""

    seal: bytes
    mask: bytes


class Unmask(NamedTuple):
    """What a client answers at last: shares of the seeds of who has sent, of the masking keys of who has not."""

    seeds: dict[int, int]
    keys: dict[int, int]


def stream(key: bytes, size: int, bits: int) -> np.ndarray:
    """``size`` numbers modulo 2^bits from ChaCha20 with this key, which is used for nothing else."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    raw = np.frombuffer(encryptor.update(bytes(size * 8)), dtype="<u8")
    return np.asarray(raw & np.uint64(2**bits - 1))


def usable(public: bytes) -> None:
    """Raise ValueError where no secret can be agreed on with this key."""
    X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))


def _agree(private: X25519PrivateKey, public: bytes, purpose: bytes, low: int, high: int) -> bytes:
    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    info = b"consilience|" + purpose + b"|%d|%d" % (low, high)
    return HKDF(SHA256(), KEY, None, info).derive(shared)


class Client:
    """One client in one round. id: from 1. threshold: how many must be there at the end."""

    def __init__(self, id: int, threshold: int, random: Callable[[int], bytes] = os.urandom) -> None:
        self.id, self.threshold, self._random = id, threshold, random
        self._seal = X25519PrivateKey.from_private_bytes(random(KEY))
        self._secret, self._seed = random(KEY), random(KEY)
        self._mask = X25519PrivateKey.from_private_bytes(self._secret)
        self._held: dict[int, bytes] = {}
        self._peers: dict[int, Keys] = {}
        self._answered = False

    def keys(self) -> Keys:
        """First message: public keys."""
        return Keys(self._seal.public_key().public_bytes_raw(), self._mask.public_key().public_bytes_raw())

    def shares(self, peers: Mapping[int, Keys]) -> dict[int, bytes]:
        """Second message: encrypted shares of its secrets, one for everybody. Raises ConsilienceError where there are
        fewer than the threshold."""
        if len(peers) < self.threshold or peers.get(self.id) != self.keys():
            raise ConsilienceError(
                f"secure aggregation: {len(peers)} clients, fewer than the threshold {self.threshold}"
            )
        self._peers = dict(peers)
        holders = sorted(peers)
        seeds = split(self._seed, self.threshold, holders, self._random)
        keys = split(self._secret, self.threshold, holders, self._random)
        sealed = {}
        for j in holders:
            plain = seeds[j].to_bytes(SHARE, "big") + keys[j].to_bytes(SHARE, "big")
            sealed[j] = ChaCha20Poly1305(self._box(j, self.id, j)).encrypt(bytes(12), plain, None)
        return sealed

    def masked(self, vector: np.ndarray, sealed: Mapping[int, bytes], bits: int) -> np.ndarray:
        """Third message: the vector under its masks. sealed: as :meth:`hold` takes them."""
        self.hold(sealed)
        total = vector.astype("<u8") + stream(self._seed, len(vector), bits)
        for j in sealed:
            if j != self.id:
                pair = stream(_pair(self._mask, self._peers[j].mask, self.id, j), len(vector), bits)
                total = total + pair if self.id < j else total - pair
        return np.asarray(total & np.uint64(2**bits - 1))

    def hold(self, sealed: Mapping[int, bytes]) -> None:
        """Keep the shares that others made for this client, by sender, of those whose vectors are expected. Raises
        ConsilienceError where they are too few."""
        if len(sealed) < self.threshold:
            raise ConsilienceError(f"secure aggregation: shares of {len(sealed)}, threshold {self.threshold}")
        self._held = dict(sealed)

    def unmask(self, there: Sequence[int]) -> Unmask:
        """Fourth message. there: whose vectors have come. Raises ConsilienceError where they are too few, where it was
        asked before (two answers could give away both secrets of a client), or where shares are none."""
        if len(set(there)) < self.threshold or self._answered or not set(there) <= set(self._held):
            raise ConsilienceError(f"secure aggregation: {len(set(there))} have sent, threshold {self.threshold}")
        self._answered = True
        seeds, keys = {}, {}
        for i, box in self._held.items():
            try:
                plain = ChaCha20Poly1305(self._box(i, i, self.id)).decrypt(bytes(12), box, None)
            except InvalidTag:
                raise ConsilienceError(f"secure aggregation: the shares of client {i} cannot be opened") from None
            seed, key = int.from_bytes(plain[:SHARE], "big"), int.from_bytes(plain[SHARE:], "big")
            if i in there:
                seeds[i] = seed
            else:
                keys[i] = key
        return Unmask(seeds, keys)

    def _box(self, peer: int, sender: int, receiver: int) -> bytes:
        """The key of a box of shares; a box is encrypted once, so that its nonce may be 0."""
        return _agree(self._seal, self._peers[peer].seal, b"seal", sender, receiver)


def _pair(private: X25519PrivateKey, public: bytes, i: int, j: int) -> bytes:
    return _agree(private, public, b"mask", min(i, j), max(i, j))


def total(
    masked: Mapping[int, np.ndarray], answers: Mapping[int, Unmask], keys: Mapping[int, Keys], threshold: int, bits: int
) -> np.ndarray:
    """The server's end: the sum of the vectors of ``masked``, modulo 2^bits. keys: of everybody whose masks are in
    these. Raises ConsilienceError where fewer than the threshold have answered."""
    if min(len(masked), len(answers)) < threshold:
        raise ConsilienceError(
            f"secure aggregation: {min(len(masked), len(answers))} clients are left, {threshold} are needed"
        )
    sum_ = np.zeros_like(next(iter(masked.values())))
    for vector in masked.values():
        sum_ = sum_ + vector
    some = dict(sorted(answers.items())[:threshold])
    for i in masked:
        sum_ = sum_ - stream(join({j: a.seeds[i] for j, a in some.items()}), len(sum_), bits)
    for lost in set(keys) - set(masked):
        private = X25519PrivateKey.from_private_bytes(join({j: a.keys[lost] for j, a in some.items()}))
        for i in masked:  # what stayed of the pair's mask in i's vector
            pair = stream(_pair(private, keys[i].mask, i, lost), len(sum_), bits)
            sum_ = sum_ - pair if i < lost else sum_ + pair
    return np.asarray(sum_ & np.uint64(2**bits - 1))
