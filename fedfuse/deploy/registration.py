"""How a site joins: it makes its key and a request signed with it, and the operator enters the request.

The private key never leaves the site. The signature says that whoever wrote the request holds the key.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedfuse.config.files import read
from fedfuse.deploy.certs import node_keys
from fedfuse.deploy.link import Link
from fedfuse.deploy.passphrase import passphrase, private_key
from fedfuse.errors import UserError, one_line
from fedfuse.network.roster import Place, fingerprint, place_from

SIGNED = ec.ECDSA(hashes.SHA384())
MANY = 2**24  # bytes that a server may say of its sites


def write_request(
    directory: Path, name: str, place: Mapping[str, int], out: Path | None = None, locked: bool = False
) -> list[Path]:
    """Make a site's key if there is none, with `locked` under a passphrase, and a request to be registered.

    Raises
    ------
    UserError
        If the name or place is none, or the directory cannot be written.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"{name[:80]}: letters, digits, '-' and '_' are allowed in a name")
    if "client" not in place:
        raise UserError("deploy request: one of --client-id I and --partition I/N is needed")
    asked = place_from({"name": name, **place})
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{name}.key"
        written = [] if file.exists() else node_keys(directory, name, passphrase(file, new=True) if locked else None)
        key = private_key(file, "key")
        content = json.dumps({"key": (directory / f"{name}.pub").read_text(encoding="utf-8"), **asdict(asked)})
        signature = base64.b64encode(key.sign(content.encode(), SIGNED)).decode()
        path = (out or directory) / f"{name}.request"
        path.write_text(json.dumps({"request": content, "signature": signature}, indent=1), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no request can be written ({error})") from error
    return [*written, path]


def read_request(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a request: the public key, and the place that the site asks for. A plain `.pub` asks for none.

    Raises
    ------
    UserError
        If it is neither, or was changed since it was signed.
    """
    try:
        content = read(path, 65536)
        if not content.lstrip().startswith(b"{"):
            _curve(content)
            return content, {"name": path.stem}
        outer = json.loads(content)
        place = json.loads(outer["request"])
        public = place.pop("key").encode()
        _curve(public).verify(base64.b64decode(outer["signature"]), outer["request"].encode(), SIGNED)
    except InvalidSignature as error:
        raise UserError(f"{path}: was changed since it was signed") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path}: neither a request nor a public key ({one_line(error)})") from error
    return public, place


def _curve(public: bytes) -> ec.EllipticCurvePublicKey:
    key = load_ssh_public_key(public)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("an elliptic-curve key is needed")
    return key


def register(link: Link, path: Path, place: Mapping[str, int]) -> str:
    """Enter a site's key into the roster and let it in; what the operator says goes before what the site asks for.

    Raises
    ------
    UserError
        If nobody says which client it is, or the server refuses.
    WorldError
        If the server cannot be asked.
    """
    from fedfuse.compat.flower_control import registered

    public, asked = read_request(path)
    if "client" in place:
        asked.pop("every", None)
    known: Place = _complete({**asked, **place}, path)
    answer = link.leave("roster", json.dumps({fingerprint(public): asdict(known)}).encode())
    also = one_line(json.loads(answer)["detail"]).removeprefix("entered")
    node = registered(link.address, link.context(), _curve(public))
    said = "registered already; its place was entered anew" if node is None else f"registered as node {node}"
    return f"{known.name}: {known.said}, {known.least} to {known.most} examples: {said}{also}"


def sites(link: Link) -> list[dict[str, str]]:
    """The sites that a server lets in, each with `site`, `clients`, `node`, `status` and `since`.

    Raises
    ------
    UserError
        If the server refuses.
    WorldError
        If it cannot be asked.
    """
    found = json.loads(json.loads(link.ask("GET", "sites", most=MANY))["detail"])
    return [{name: one_line(value, 100) for name, value in one.items()} for one in found]


def node_of(link: Link, which: str) -> str:
    """The node id of a site by its name; what is no name here may be an id already.

    Raises
    ------
    UserError
        If no site has this name, or several have.
    """
    found = sites(link)
    ids = [one["node"] for one in found if one["site"] == which]
    if len(ids) == 1:
        return ids[0]
    if not ids and which.isdecimal():
        return which
    if ids:
        raise UserError(f"{which}: is the name of {len(ids)} sites; say which by its id: {', '.join(ids)}")
    raise UserError(f"{which}: is no site here; allowed: {', '.join(one['site'] or one['node'] for one in found)}")


def _complete(values: dict[str, Any], path: Path) -> Place:
    if "client" not in values:
        raise UserError(f"{path}: says not which client it is; --client-id I or --partition I/N is needed")
    return place_from(values)
