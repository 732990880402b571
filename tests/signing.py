"""Run by a Python that has model-signing (and with it in-toto-attestation and securesystemslib): signs what tpshard
wrote, and checks it again. ``python tests/signing.py statement FILE FOLDER`` exits with 1 where the folder's files are
not what the signed statement says; ``… keys FOLDER`` makes a pair of keys there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner


def check_statement(file: Path, folder: Path) -> bool:
    signer = CryptoSigner.generate_ed25519()
    envelope = Envelope(file.read_bytes(), "application/vnd.in-toto+json", {})
    envelope.sign(signer)
    again = Envelope.from_dict(envelope.to_dict())
    again.verify([signer.public_key], 1)
    statement = Statement.copy_from_pb(json_format.Parse(again.payload, statement_pb2.Statement()))
    statement.validate()
    said = {subject.name: dict(subject.digest) for subject in statement.pb.subject}
    found = {
        path.relative_to(folder).as_posix(): {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.rglob("*")
        if path.is_file()
    }
    return said == found


def make_keys(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "key").write_bytes(private)
    (folder / "key.pub").write_bytes(public)


if __name__ == "__main__":
    if sys.argv[1] == "keys":
        make_keys(Path(sys.argv[2]))
        sys.exit()
    sys.exit(0 if check_statement(Path(sys.argv[2]), Path(sys.argv[3])) else 1)
