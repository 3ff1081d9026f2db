"""Certificates to try a deployment out with: for names and addresses, and nothing else."""

import pytest
from cryptography import x509

from psl_flower.app.certificates import main

LONG = "-".join(["node"] * 12) + ".europe-west.example.org"


def test_a_certificate_names_its_hosts_whatever_their_length(tmp_path):
    folder = tmp_path / "new" / "certificates"
    assert main(["superlink", "192.0.2.7", "::1", LONG, "*.example.org", "--folder", str(folder)]) == 0
    authority, server = (x509.load_pem_x509_certificate((folder / f"{n}.crt").read_bytes()) for n in ("ca", "server"))
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink", LONG, "*.example.org"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    server.verify_directly_issued_by(authority)
    assert (folder / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["", "my server", "köln.de", "server:9093", "https://server", "-server"])
def test_what_is_no_host_is_refused(host, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--folder", str(tmp_path / "made"), "--", "good", host])
    assert f"a host must be a name of letters, digits, dots and hyphens, or an address, got {host!r}" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_written_to_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--folder", "/dev/null/certificates"])
    assert "--folder: /dev/null/certificates cannot be written to" in capsys.readouterr().err
