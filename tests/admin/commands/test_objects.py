import os
from pathlib import Path

from nbdserve.admin.control import Control
from tests.admin.clients import RawClient


def test_secrets_are_in_files_and_never_shown(client: RawClient, control: Control, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"aGlkZGVu")
    assert client.execute("object-add", qom_type="secret", id="s", file=str(key), format="base64") == {}
    assert control.objects.secrets == {"s": b"hidden"}
    assert client.execute("qom-get", path="/objects/s", property="file") == str(key)
    for name in ("data", "secret"):
        assert "not found" in client.execute("qom-get", path="/objects/s", property=name)
    assert "give 'file'" in client.execute("object-add", qom_type="secret", id="t", data="x")
    absent = client.execute("object-add", qom_type="secret", id="t", file=f"{tmp_path}/absent")
    assert absent == f"Could not open '{tmp_path}/absent': No such file or directory"
    for outside in ("/etc/hostname", f"{tmp_path}/../x"):
        refused = client.execute("object-add", qom_type="secret", id="t", file=outside)
        assert refused == (
            f"Could not open '{outside}': it is outside the roots for secrets and sockets; "
            "add its directory to roots of [admin]"
        )
    os.mkfifo(tmp_path / "fifo")
    fifo = client.execute("object-add", qom_type="secret", id="t", file=f"{tmp_path}/fifo")
    assert "neither a regular file nor a block device" in fifo
    assert client.execute("object-del", id="s") == {}
    assert control.objects.secrets == {}


def test_what_is_accepted_and_what_is_not(client: RawClient) -> None:
    assert client.execute("object-add", qom_type="iothread", id="io") == {}
    assert {"name": "io", "type": "child<iothread>"} in client.execute("qom-list", path="/objects")
    refused = client.execute("object-add", qom_type="tls-creds-x509", id="t", endpoint="server", dir="/x")
    assert refused.startswith("'tls-creds-x509': TLS is not supported yet")


def test_an_authorization_list(client: RawClient, tmp_path: Path) -> None:
    rule = {"match": "*.example.org", "policy": "allow", "format": "glob"}
    assert client.execute("object-add", qom_type="authz-list", id="a", rules=[rule]) == {}
    assert client.execute("qom-get", path="/objects/a", property="policy") == "deny"
    assert client.execute("qom-get", path="/objects/a", property="rules") == [rule]
    assert client.execute("qom-set", path="/objects/a", property="rules", value=[]) == {}
    assert client.execute("qom-get", path="/objects/a", property="rules") == []
    assert client.execute("qom-set", path="/objects/a", property="zz", value=1).endswith("'authz-list.zz' not found")
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    assert "identities of TLS clients" in client.execute("nbd-server-start", addr=address, tls_authz="a")
    refused = client.execute("nbd-server-start", addr=address, tls_creds="a")
    assert refused == "Object with id 'a' is not TLS credentials"
