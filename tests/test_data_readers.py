"""Facts about files of visibilities, written here in every layout that is read."""

import bz2
import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.coordinates import FK4, SkyCoord
from astropy.io import fits

from scoreinv.data import inspect, read_visibilities
from scoreinv.data.formats.files import kind_of

ARCSEC = np.pi / 180 / 3600
LIGHT = 299792458.0


def point_source(uv, east, north):
    """Visibilities of 1 Jy at an offset [arcsec], in the package's convention."""
    return np.exp(-2j * np.pi * (uv @ np.array([east, north])) * ARCSEC)


@pytest.fixture
def uv():
    return np.random.default_rng(3).normal(0, 3e4, (60, 2))


def write_visilens(path, uv, data, sigma):
    rows = [*uv.T, data.real, data.imag, sigma, np.arange(60) % 5, 5 + np.arange(60) % 3]
    np.append(np.ravel(rows), 42.5).astype("<f8").tofile(path)
    return path


def test_visilens(tmp_path, uv):
    """The file has the opposite sign, so the same sky comes out at the same place."""
    sigma = np.full(60, 0.5)
    sigma[:3] = -1, 0, -1
    path = write_visilens(tmp_path / "a.bin", uv, point_source(-uv, 0.5, -0.3), sigma)
    vis = read_visibilities(path)
    assert len(vis) == 57 and vis.flagged == 3 and vis.primary_beam == 42.5
    assert vis.weight.unique() == 4 and vis.antennas[0].tolist() == [3, 5]
    np.testing.assert_allclose(vis.data, point_source(vis.uv.numpy(), 0.5, -0.3))
    np.testing.assert_array_equal(vis.uv, -uv[3:])
    np.testing.assert_array_equal(read_visibilities(path, sign=-1).uv, uv[3:])
    assert len(vis.sha256) == 64 and vis.source == "a.bin (visilens)"


def test_visilens_errors(tmp_path, uv):
    path = write_visilens(tmp_path / "a.bin", uv, point_source(uv, 1, 1), np.ones(60))
    with pytest.raises(
        ValueError, match="visilens, whose unit is known; leave out unit='klambda'"
    ):
        read_visibilities(path, unit="klambda")
    content = path.read_bytes()
    path.write_bytes(content[:-11])
    with pytest.raises(ValueError, match=r"has 3357 bytes, expected 8 \* \(7 N \+ 1\): truncated"):
        read_visibilities(path)
    path.write_bytes(content[: 8 * (7 * 30 + 1)])
    with pytest.raises(ValueError, match="fractions in its antenna columns, expected whole"):
        read_visibilities(path)


FREQUENCY, STEP, OFFSETS = 43e9, 1e6, np.array([0.0, 8e7])


def uvfits_hdus(uv, stokes=-1, hands=("RR", "LL"), with_if=True):
    """30 rows, 2 IFs, 3 channels of a point source; u, v in seconds, exponent +2 pi i."""
    frequency = FREQUENCY + OFFSETS[:, None] + STEP * np.arange(3)
    if not with_if:
        frequency = frequency[:1]
    seconds = uv[:30] / FREQUENCY
    cells = np.zeros((30, 1, 1, *frequency.shape, len(hands), 3))
    baselines = seconds[:, None, None, :] * frequency[..., None]
    value = point_source(-baselines.reshape(-1, 2), 0.5, -0.3).reshape(30, *frequency.shape)
    for hand, (excess, weight) in enumerate([(0.2, 2.0), (-0.2, 6.0), (9.0, 1.0)][: len(hands)]):
        cells[:, 0, 0, ..., hand, 0] = value.real + excess
        cells[:, 0, 0, ..., hand, 1] = value.imag
        cells[:, 0, 0, ..., hand, 2] = weight
    if not with_if:
        cells = cells[:, :, :, 0]
    first, second = 1 + np.arange(30) % 2, 3 + np.arange(30) % 4
    # Rows in reverse order of time, split into a day and its fraction.
    date = [np.full(30, 2457000.0), (29 - np.arange(30)) / 100]
    names = ["UU---SIN", "VV---SIN", "BASELINE", "DATE", "DATE"]
    values = [*seconds.T, 256.0 * first + second, *date]
    data = fits.GroupData(cells, bitpix=-64, parnames=names, pardata=values)
    hdu = fits.GroupsHDU(data)
    axes = ["COMPLEX", "STOKES", "FREQ"] + (["IF"] if with_if else []) + ["RA", "DEC"]
    for i, name in enumerate(axes, 2):
        hdu.header[f"CTYPE{i}"] = name
    reference = dict(COMPLEX=(1, 1), STOKES=(stokes, np.sign(stokes)), FREQ=(FREQUENCY, STEP))
    reference |= dict(RA=(187.7, 1), DEC=(12.4, 1), IF=(1, 1))
    for i, name in enumerate(axes, 2):
        value, step = reference[name]
        hdu.header.update({f"CRVAL{i}": value, f"CDELT{i}": step, f"CRPIX{i}": 1.0})
    column = fits.Column("IF FREQ", "2D", array=OFFSETS[None])
    table = fits.BinTableHDU.from_columns([column], name="AIPS FQ")
    return fits.HDUList([hdu, table] if with_if else [hdu])


def test_uvfits(tmp_path, uv):
    hdus = uvfits_hdus(uv)
    hdus[0].data["DATA"][4, 0, 0, 1, 2, 0, 2] = -2
    path = tmp_path / "a.uvfits"
    hdus.writeto(path)
    vis = read_visibilities(path)
    assert len(vis) == 30 * 6 - 1 and vis.flagged == 1
    np.testing.assert_allclose(vis.data, point_source(vis.uv.numpy(), 0.5, -0.3), atol=1e-9)
    np.testing.assert_allclose(vis.weight, 4 / (1 / 2 + 1 / 6))
    np.testing.assert_allclose(vis.uv[:30], -uv[29::-1], rtol=1e-12)
    np.testing.assert_allclose(vis.uv[120:150], -uv[29::-1] * (1 + 81e6 / FREQUENCY), rtol=1e-12)
    np.testing.assert_allclose(vis.time[:30], 2457000 + np.arange(30) / 100, rtol=0, atol=1e-8)
    assert vis.antennas[:2].tolist() == [[2, 4], [1, 3]]
    assert (vis.ra, vis.dec) == (187.7, 12.4)
    assert vis.frequency == pytest.approx(FREQUENCY + 4e7 + STEP)


def test_uvfits_without_if_and_with_linear_or_intensity(tmp_path, uv):
    for k, (stokes, hands) in enumerate([(-5, "XX YY".split()), (1, ["I"])]):
        path = tmp_path / f"{k}.uvfits"
        uvfits_hdus(uv, stokes, hands, with_if=False).writeto(path)
        vis = read_visibilities(path)
        assert len(vis) == 90 and vis.frequency == FREQUENCY + STEP
        assert float(vis.weight[0]) == pytest.approx(6.0 if stokes == -5 else 2.0)


def with_setup(uv, source=1, setup=1):
    """As CASA's exportuvfits writes one field or more: positions and setups are in tables, zeros in the header."""
    hdus = uvfits_hdus(uv)
    old, header = hdus[0].data, hdus[0].header
    names = [*old.parnames, "FREQSEL", "SOURCE"]
    columns = [np.asarray(old.par(i), float) for i in range(len(old.parnames))]
    columns += [np.broadcast_to(v, 30).astype(float) for v in (setup, source)]
    data = fits.GroupData(old["DATA"], bitpix=-64, parnames=names, pardata=columns)
    hdu = fits.GroupsHDU(data)
    for card in header.cards:
        if card.keyword[:5] in ("CTYPE", "CRVAL", "CDELT", "CRPIX"):
            hdu.header[card.keyword] = 0.0 if card.keyword in ("CRVAL6", "CRVAL7") else card.value
    setups = [
        fits.Column("FRQSEL", "J", array=[1, 2]),
        fits.Column("IF FREQ", "2D", array=[OFFSETS, OFFSETS + 1e9]),
    ]
    sources = [
        fits.Column("ID. NO.", "J", array=[1, 2]),
        fits.Column("RAEPO", "D", array=[252.3137, 252.4]),
        fits.Column("DECEPO", "D", array=[-14.3692, -14.3]),
        fits.Column("EPOCH", "D", array=[2000.0, 1950.0]),
    ]
    tables = [
        fits.BinTableHDU.from_columns(columns, name=name)
        for name, columns in (("AIPS FQ", setups), ("AIPS SU", sources))
    ]
    return fits.HDUList([hdu, *tables])


def test_uvfits_of_sources_and_setups_in_tables(tmp_path, uv):
    path = tmp_path / "a.uvfits"
    with_setup(uv).writeto(path)
    vis = read_visibilities(path)
    assert (vis.ra, vis.dec) == (252.3137, -14.3692)
    with_setup(uv, source=2, setup=2).writeto(path, overwrite=True)
    other = read_visibilities(path)
    np.testing.assert_allclose(other.uv[:30], vis.uv[:30] * (1 + 1e9 / FREQUENCY), rtol=1e-12)
    b1950 = SkyCoord(252.4, -14.3, unit="deg", frame=FK4(equinox="B1950")).icrs
    assert (other.ra, other.dec) == pytest.approx((b1950.ra.deg, b1950.dec.deg))
    for wrong in ({"source": 1 + np.arange(30) % 2}, {"setup": 1 + np.arange(30) % 2}):
        with_setup(uv, **wrong).writeto(path, overwrite=True)
        with pytest.raises(ValueError, match="has 2 values of .*, expected one; export one at a"):
            read_visibilities(path)
    with_setup(uv, source=3).writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="has 0 rows of ID. NO. 3 in a table, expected one"):
        read_visibilities(path)


@pytest.mark.parametrize(("epoch", "arcsec"), [(1950.0, 2435), ("J2000", 0), (0.0, 0)])
def test_uvfits_of_another_epoch(tmp_path, uv, epoch, arcsec):
    """Positions of B1950 lie 0.7 degrees from those of the same numbers in ICRS."""
    hdus = uvfits_hdus(uv)
    hdus[0].header["EQUINOX"] = epoch
    hdus.writeto(tmp_path / "a.uvfits")
    vis = read_visibilities(tmp_path / "a.uvfits")
    here, there = (SkyCoord(*p, unit="deg") for p in ((187.7, 12.4), (vis.ra, vis.dec)))
    assert here.separation(there).arcsec == pytest.approx(arcsec, abs=1)


def test_uvfits_may_be_compressed(tmp_path, uv):
    plain, packed = tmp_path / "a.uvfits", tmp_path / "b.uvfits.gz"
    uvfits_hdus(uv).writeto(plain)
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert kind_of(packed) == "uvfits"
    assert torch.equal(read_visibilities(packed).data, read_visibilities(plain).data)
    packed.write_bytes(packed.read_bytes()[:900])
    with pytest.raises(ValueError, match="damaged or truncated .* copy or download it again"):
        read_visibilities(packed)


def test_uvfits_errors(tmp_path, uv):
    path = tmp_path / "a.uvfits"
    uvfits_hdus(uv, hands=["RR"]).writeto(path)
    with pytest.raises(
        ValueError, match="has correlations RR; Stokes I needs I, RR and LL, or XX"
    ):
        read_visibilities(path)
    hdus = uvfits_hdus(uv)
    hdus[:1].writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="has 2 IFs and no AIPS FQ table"):
        read_visibilities(path)
    hdus.writeto(path, overwrite=True)
    path.write_bytes(path.read_bytes()[: 3 * 2880])
    with pytest.raises(ValueError, match="damaged or truncated FITS file .*; copy or download it"):
        read_visibilities(path)
    fits.PrimaryHDU(np.ones((9, 9))).writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="read as 'fits', .* images are read with read_cutout"):
        read_visibilities(path)
    with pytest.raises(ValueError, match="has no random groups, expected visibilities in UVFITS"):
        read_visibilities(path, format="uvfits")
    flags = fits.BinTableHDU.from_columns([fits.Column("SOURCE", "J", array=[1])], name="AIPS FG")
    fits.HDUList([*uvfits_hdus(uv), flags]).writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="flags in an AIPS FG table, which is not read; apply"):
        read_visibilities(path)


@pytest.mark.parametrize(
    ("keys", "unit"),
    [("u v V weights", None), ("u v Vis Wgt", None), ("uu vv data weight", "klambda")],
)
def test_npz_layouts(tmp_path, uv, keys, unit):
    data, weight = point_source(uv, 0.5, -0.3), np.full(60, 2.0)
    weight[7] = 0
    factor = 1e-3 if unit else 1
    values = [*(factor * uv.T), data, weight]
    path = tmp_path / "a.npz"
    np.savez(path, **dict(zip(keys.split(), (x[None] for x in values), strict=True)))
    vis = read_visibilities(path, unit=unit)
    np.testing.assert_allclose(vis.uv, np.delete(uv, 7, 0), rtol=1e-12)
    np.testing.assert_array_equal(vis.data, np.delete(data, 7))
    assert vis.flagged == 1
    np.testing.assert_allclose(read_visibilities(path, unit, sign=+1).uv, -vis.uv)


def test_npz_errors(tmp_path, uv):
    path = tmp_path / "a.npz"
    table = dict(uu=uv[:, 0], vv=uv[:, 1], data=np.ones(60, complex), weight=np.ones(60))
    np.savez(path, **table)
    with pytest.raises(ValueError, match="keys of MPoL, .* pass unit='klambda' or unit='lambda'"):
        read_visibilities(path)
    with pytest.raises(ValueError, match="sign is 2, expected -1 or"):
        read_visibilities(path, "lambda", sign=2)
    np.savez(path, **{k: np.stack([v, v]) for k, v in table.items()})
    with pytest.raises(ValueError, match=r"has 2 channels in uu, with shape \(2, 60\); an image"):
        read_visibilities(path, "lambda")
    np.savez(path, **{k: v for k, v in table.items() if k != "vv"})
    with pytest.raises(ValueError, match="has the keys uu, data, weight; expected those of frank"):
        read_visibilities(path)
    np.savez(path, **(table | dict(uu=np.array([None, 1]))))
    with pytest.raises(ValueError, match="holds Python objects"):
        read_visibilities(path)
    np.savez(path, **(table | dict(weight=np.ones(59))))
    with pytest.raises(
        ValueError, match="vv has 60, data has 60, weight has 59 numbers, expected"
    ):
        read_visibilities(path, "lambda")
    for key, values in (
        ("data", np.full(60, "a")),
        ("weight", np.ones(60) + 1j),
        ("uu", np.ones(60) * 1j),
    ):
        np.savez(path, **(table | {key: values}))
        with pytest.raises(ValueError, match=f"{key} of type .*, expected .*numbers"):
            read_visibilities(path, "lambda")
    np.savez_compressed(path, **table)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged .npz archive"):
        read_visibilities(path, "lambda")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="damaged .npz archive"):
        read_visibilities(path)


def table_text(uv, data, weight):
    rows = np.column_stack([uv, data.real, data.imag, weight])
    lines = [" ".join(f"{x:.17g}" for x in row) for row in rows]
    return "# u v Re Im weight\n" + "\n".join(lines) + "\n"


def test_text_tables_in_every_unit(tmp_path, uv):
    data = point_source(uv, 0.5, -0.3)
    path = tmp_path / "a.txt"
    path.write_text(table_text(uv, data, np.ones(60)))
    np.testing.assert_allclose(read_visibilities(path).uv, uv)
    np.testing.assert_allclose(read_visibilities(path, unit="klambda").uv, 1000 * uv)
    metres = read_visibilities(path, unit="m", frequency=2.3e11)
    np.testing.assert_allclose(metres.uv, uv * 2.3e11 / LIGHT)
    assert metres.frequency == 2.3e11
    for name, opener in (("b.txt.gz", gzip.open), ("c.txt.bz2", bz2.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write(path.read_text())
        np.testing.assert_allclose(read_visibilities(tmp_path / name).data, data)


def test_text_errors(tmp_path, uv):
    path = tmp_path / "a.txt"
    path.write_text(table_text(uv, np.ones(60, complex), np.ones(60)))
    for unit, message in (
        ("m", r"unit='m' needs frequency=... \[Hz\]"),
        ("km", "unit is 'km', expected 'lambda', 'klambda' or 'm'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_visibilities(path, unit=unit)
    for frequency in (0.0, -2.3e11):
        with pytest.raises(ValueError, match="frequency is .* Hz, expected above 0"):
            read_visibilities(path, unit="m", frequency=frequency)
    with pytest.raises(ValueError, match="read as 'ms', expected visibilities in one of visilens"):
        read_visibilities(path, format="ms")
    for text, message in (
        ("1 2 3 4\n", "has 4 columns, expected five: u, v, Re, Im, weight"),
        ("# nothing\n", "has no rows of numbers; expected u, v, Re, Im, weight"),
        ("a,b\n", "is not a table of numbers .* with # before comments"),
        ("1 2 3 4 5\n1 2 3 4\n", "is not a table of numbers"),
        ("1 2 3 4 -5\n", "weight is negative in 1 of 1 rows"),
        ("1 2 3 4 0\n", "there are no visibilities: is everything flagged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_visibilities(path)
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"1 2 3 4 5\n" * 999)[:-9])
    with pytest.raises(ValueError, match="truncated or not a text table"):
        read_visibilities(packed)


@pytest.mark.parametrize("reader", [read_visibilities, inspect])
def test_foreign_files(tmp_path, reader):
    contents = {
        "a.jpg": (b"\xff\xd8\xff\xe0\x00", r"is of no known kind: it begins with b'.xff"),
        "a.tar.gz": (b"\x1f\x8b\x08\x00", "is an archive; unpack it and read a file inside"),
        "a.txt": (b"", r"is empty \(0 bytes\); copy or download it again"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            reader(tmp_path / name)
    (tmp_path / "a.ms").mkdir()
    with pytest.raises(ValueError, match="is a folder, expected a file; .* exportuvfits"):
        reader(tmp_path / "a.ms")
    with pytest.raises(FileNotFoundError, match="b.txt does not exist"):
        reader(tmp_path / "b.txt")


def test_inspection_of_visibilities(tmp_path, uv):
    path = write_visilens(tmp_path / "a.bin", uv, np.full(60, 0.5 + 0j), np.full(60, 0.1))
    report = inspect(path)
    assert (report.kind, report.shape, report.unit) == ("visibilities (visilens)", (60,), "Jy")
    assert report.range == (0.5, 0.5)
    lines = str(report).splitlines()
    column = lines[0].index(str(path))
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    entries = dict(report.entries)
    low, high = np.sort(np.hypot(*uv.T))[[0, -1]] / 1000
    assert entries["baselines"] == f"{low:.4g} to {high:.4g} klambda"
    assert entries["natural rms"] == f"{0.1 / 60**0.5:.4g} Jy/beam"
    assert entries["primary beam"].startswith("42.5 arcsec")
    assert any("scatter 0.00 times as much" in note for note in report.notes)


def test_inspection_warns_about_tables(tmp_path, uv):
    path = tmp_path / "a.txt"
    both = np.concatenate([uv, -uv])
    path.write_text(table_text(both, np.ones(120, complex), np.ones(120)))
    notes = " ".join(inspect(path).notes)
    for part in (
        "weights cannot be checked",
        "all weights are equal",
        "60 visibilities are copies",
        "taken as lambda",
        "no Fourier sign",
    ):
        assert part in notes
    assert "taken as lambda" not in " ".join(inspect(path, unit="klambda").notes)


@pytest.fixture
def script():
    path = Path(__file__).parents[1] / "data_scripts" / "fetch.py"
    spec = importlib.util.spec_from_file_location("fetch", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fetch"]


def test_fetch_verifies_what_it_gets(script, tmp_path, caplog, monkeypatch):
    origin = tmp_path / "origin.bin"
    origin.write_bytes(b"visibilities")
    good = script.RemoteFile("a/b.bin", origin.as_uri(), script.digest(origin))
    bad = script.RemoteFile("a/c.bin", origin.as_uri(), "0" * 64)
    assert script.fetch(good, tmp_path) is True
    assert script.fetch(good, tmp_path) is False
    assert (tmp_path / "a/b.bin").read_bytes() == b"visibilities"
    with pytest.raises(ValueError, match=f"SHA-256 is {good.sha256}, expected {'0' * 64}"):
        script.fetch(bad, tmp_path)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]
    (tmp_path / "a/b.bin").write_bytes(b"noise")
    with pytest.raises(ValueError, match="is there with other content; remove it to fetch it"):
        script.fetch(good, tmp_path)
    monkeypatch.setattr(script, "DATASETS", {"good": [good], "bad": [bad]})
    (tmp_path / "a/b.bin").unlink()
    assert script.main(["good", "--to", str(tmp_path)]) == 0
    assert script.main(["--to", str(tmp_path)]) == 1
    assert "failed  a/c.bin" in caplog.text
    with pytest.raises(SystemExit):
        script.main(["cat", "--to", str(tmp_path)])


def test_every_source_is_pinned(script):
    for remote in (r for remotes in script.DATASETS.values() for r in remotes):
        assert len(remote.sha256) == 64
        assert len(remote.url.split("/")[5]) == 40, "not a full commit"
        assert Path(remote.path).name == Path(remote.url).name
