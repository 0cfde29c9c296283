"""ImageNet weights: fetched from a server on this machine, and loaded whatever library saved them."""

import hashlib
import http.server
import re
import tarfile
import threading
import warnings
from pathlib import Path

import pretrainedmodels
import pytest
import timm
import torch
import torchvision
from torch import nn

from whalelib import keypoints, models, weights
from whalelib.weights import Source, WeightsError


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` by path; of those in ``cut`` only the first bytes; ``plain`` ones without ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.plain, self.asked = {}, {}, set(), []

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, begun = self.server, 0
        server.asked.append((self.path, self.headers["Range"]))
        content = server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        if self.headers["Range"] and self.path not in server.plain:
            begun = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if begun >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - begun))
        self.end_headers()
        self.wfile.write(content[begun : server.cut.get(self.path)])

    def log_message(self, *_): ...


def test_weights_are_known_by_what_is_in_them(tmp_path, monkeypatch):
    for name in weights.NAMES:
        monkeypatch.delenv(weights.variable(name), raising=False)
    monkeypatch.setenv("WHALE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(weights, "KAGGLE_INPUT", tmp_path / "kaggle")
    assert weights.content("densenet121") == ""
    file = tmp_path / "kaggle" / "some-data-set" / weights.sources("densenet121")[0].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    assert weights.found("densenet121") == file
    first = weights.content("densenet121")
    moved = tmp_path / "weights" / file.name
    moved.parent.mkdir()
    moved.write_bytes(b"one")
    assert weights.found("densenet121") == moved
    assert weights.content("densenet121") == first
    moved.write_bytes(b"another")
    assert weights.content("densenet121") not in ("", first)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def saved(path, value):
    torch.save({"weight": torch.full((300,), float(value))}, path)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Send weights into a folder of this test, and return it."""
    monkeypatch.setenv("WHALE_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("no_proxy", "*")
    for name in weights.NAMES:
        monkeypatch.delenv(weights.variable(name), raising=False)
    return tmp_path / "weights"


@pytest.fixture
def two(server, place, tmp_path, monkeypatch):
    """Two files, of which either will do for SENet-154, on two addresses; return what is in them."""
    contents, found = {}, []
    for number, name in enumerate(("own", "mirror")):
        content = saved(tmp_path / "saved.pth", number)
        sum_ = hashlib.sha256(content).hexdigest()
        file = f"{name}-{sum_[:8]}.pth"
        contents[file] = server.files[f"/{file}"] = content
        found.append(Source(server.url(file), sum_[:8], "" if number == 0 else "perhaps others"))
    monkeypatch.setattr(weights, "sources", lambda _: tuple(found))
    return contents


def test_fetched_once(server, place, two):
    file = next(iter(two))
    assert weights.found("senet154") is None
    for _ in range(2):
        assert weights.fetch("senet154") == place / file
    assert (place / file).read_bytes() == two[file]
    assert server.asked == [(f"/{file}", None)]
    assert weights.found("senet154") == place / file
    assert [path.name for path in place.glob("[!.]*")] == [file]


def test_the_environment_comes_first(place, two, monkeypatch):
    weights.fetch("senet154")
    monkeypatch.setenv("WHALE_SENET154", "elsewhere.pth")
    assert weights.found("senet154") == Path("elsewhere.pth")


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_the_next_address_is_tried(server, place, two, broken, capsys):
    own, mirror = two
    if broken == "missing":
        del server.files[f"/{own}"]
    else:
        server.files[f"/{own}"] = two[mirror]
    assert weights.fetch("senet154") == place / mirror
    out = capsys.readouterr().out
    assert f"not from {server.url(own)}: " in out
    assert ("HTTP Error 404" if broken == "missing" else "not the expected weights") in out
    assert f"{mirror}: perhaps others" in out
    assert [path.name for path in place.glob("[!.]*")] == [mirror]


def test_no_address_works(server, place, two):
    own, mirror = two
    server.files = {f"/{own}": two[mirror]}
    with pytest.raises(
        WeightsError, match=rf"(?s)senet154 can't be had:.*{own}: not the expected.*{mirror}: HTTP.*--from"
    ):
        weights.fetch("senet154")
    assert list(place.glob("[!.]*")) == []


def test_a_server_that_is_not_there(place, monkeypatch):
    monkeypatch.setattr(
        weights, "sources", lambda _: (Source("http://127.0.0.1:9/x-12345678.pth", "12345678"),)
    )
    with pytest.raises(WeightsError, match=r"x-12345678\.pth: .*refused"):
        weights.fetch("senet154")


def test_what_broke_off_is_gone_on_with(server, place, two):
    own, mirror = two
    del server.files[f"/{mirror}"]
    server.cut[f"/{own}"] = 1000
    with pytest.raises(WeightsError, match=r"broke off after 1,000 of [\d,]+ bytes"):
        weights.fetch("senet154")
    assert (place / f"{own}.part").stat().st_size == 1000
    server.cut.clear()
    assert weights.fetch("senet154").read_bytes() == two[own]
    assert (f"/{own}", "bytes=1000-") in server.asked


def test_a_server_without_ranges_sends_the_whole(server, place, two):
    own = next(iter(two))
    place.mkdir()
    (place / f"{own}.part").write_bytes(two[own][:500])
    server.plain.add(f"/{own}")
    assert weights.fetch("senet154").read_bytes() == two[own]


@pytest.mark.parametrize("length", [500, None, 9999])
def test_a_piece_of_another_file_is_thrown_away(server, place, two, length):
    own = next(iter(two))
    place.mkdir()
    (place / f"{own}.part").write_bytes(b"x" * (length or len(two[own])))
    assert weights.fetch("senet154").read_bytes() == two[own]
    assert [range_ for _, range_ in server.asked] == [f"bytes={length or len(two[own])}-", None]


def test_a_whole_piece_is_taken(server, place, two):
    own = next(iter(two))
    place.mkdir()
    (place / f"{own}.part").write_bytes(two[own])
    assert weights.fetch("senet154").read_bytes() == two[own]


def test_a_damaged_file_is_fetched_anew(server, place, two):
    path = weights.fetch("senet154")
    path.write_bytes(two[path.name][:-1])
    assert weights.fetch("senet154").read_bytes() == two[path.name]


def test_sizes_have_a_limit(server, place, two, monkeypatch):
    monkeypatch.setattr(weights, "LIMIT", 999)
    with pytest.raises(WeightsError, match=r"bytes, more than 999"):
        weights.fetch("senet154")


def test_what_can_hold_code_is_not_taken(server, place, tmp_path, monkeypatch):
    """A file that pickles more than tensors, and one of torch's oldest format, though their sums are right."""
    torch.save({"weight": nn.Linear(1, 1)}, tmp_path / "code.pth")
    with tarfile.open(tmp_path / "oldest.pth", "w") as archive:
        archive.add(tmp_path / "code.pth", "storages")
    found = []
    for file in ("code.pth", "oldest.pth"):
        content = server.files[f"/{file}"] = (tmp_path / file).read_bytes()
        found.append(Source(server.url(file), hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(weights, "sources", lambda _: tuple(found))
    with pytest.raises(WeightsError, match=r"(?s)code\.pth: \w.*oldest\.pth: \w"):
        weights.fetch("senet154")
    assert list(place.glob("[!.]*")) == []


def test_from_a_folder_whatever_the_name(server, place, two, tmp_path):
    _, mirror = two
    local = tmp_path / "downloads"
    local.mkdir()
    (local / "a.pth").write_bytes(b"something else")
    (local / "weights (1).pth").write_bytes(two[mirror])
    assert weights.fetch("senet154", local=local) == place / mirror
    assert (place / mirror).read_bytes() == two[mirror]
    assert server.asked == []


def test_from_a_folder_without_it(server, place, two, tmp_path):
    local = tmp_path / "downloads"
    local.mkdir()
    saved(local / "other.pth", 7)
    with pytest.raises(
        WeightsError, match=r"of the 1 files .* none has a SHA-256 that begins with \w{8}, \w{8}"
    ):
        weights.fetch("senet154", local=local)
    assert server.asked == []


def test_command_line(server, place, two, capsys):
    own = next(iter(two))
    assert weights.main(["senet154"]) == 0
    assert capsys.readouterr().out == f"{place / own}\nexport WHALE_SENET154={place / own}\n"


def test_command_line_goes_on_after_a_failure(server, place, two, monkeypatch, capsys):
    good = weights.sources("senet154")
    monkeypatch.setattr(weights, "sources", lambda name: good if name == "resnet101" else good[:0])
    assert weights.main(["senet154", "resnet101"]) == 1
    out, err = capsys.readouterr()
    assert "error: senet154 can't be had" in err
    assert "export WHALE_RESNET101=" in out


def test_command_line_with_another_name(place, capsys):
    assert weights.main(["vgg16"]) == 2
    assert "choose one of senet154, resnet101" in capsys.readouterr().err


TIMM = {
    "senet154": "legacy_senet154",
    "resnet101": "resnet101.tv_in1k",
    "se_resnet101": "legacy_seresnet101",
    "se_resnext101_32x4d": "legacy_seresnext101_32x4d",
    "se_resnext50_32x4d": "legacy_seresnext50_32x4d",
    "densenet121": "densenet121.tv_in1k",
}


@pytest.mark.parametrize("name", weights.NAMES)
def test_addresses_are_those_of_the_libraries(name):
    urls = [source.url for source in weights.sources(name)]
    theirs = {pretrainedmodels.pretrained_settings[name]["imagenet"]["url"]}
    if url := timm.get_pretrained_cfg(TIMM[name]).url:
        theirs.add(url)
    if name in ("resnet101", "densenet121"):
        theirs.add(torchvision.models.get_model_weights(name).IMAGENET1K_V1.url)
    assert theirs <= set(urls)
    assert all(url in theirs or url.startswith(weights.MONAI) for url in urls)
    assert len(set(urls)) == len(urls)


@pytest.mark.parametrize("name", weights.NAMES)
def test_sums_begin_as_the_names_end(name):
    for source in weights.sources(name):
        digits = re.search(r"-([0-9a-f]{8,9})\.pth$", source.url)[1]
        assert source.sha256.startswith(digits)
        assert len(source.sha256) in (len(digits), 64)


def backbone(name, path):
    """Return a network of the project with weights of any known file, as (N, 3, H, W) to (N, F, h, w)."""
    sums = weights.known(name)
    if name == "senet154":
        network = models.senet154(weights=path, sha256=sums)
        return lambda images: network.eval()(nn.functional.pad(images, (0, 0, 0, 0, 0, 1)))
    if name == "densenet121":
        network = models.densenet121(path, sha256=sums)
        return lambda images: network.eval()(images).relu()  # timm's map is behind the ReLU
    if name == "se_resnext50_32x4d":
        network = keypoints.se_resnext_maps(50, path, sha256=sums).eval()
        return lambda images: network(0.65 + 0.25 * images)[-1]  # it normalises
    return models.second_place_backbone(name, path, sha256=sums).eval()


def randomised(name):
    """Return timm's network with random weights and, so that each tensor tells, random statistics."""
    torch.manual_seed(0)
    network = timm.create_model(TIMM[name].partition(".")[0])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1)
            module.bias.data.normal_(0, 0.1)
    return network.eval()


# SENet-154 last: two of it with their tensors take 1.5 GB.
@pytest.mark.parametrize("name", sorted(weights.NAMES, key="senet154".__eq__))
def test_timms_weights_give_the_same_maps(name, monkeypatch):
    theirs = randomised(name)
    state, given = theirs.state_dict(), []
    monkeypatch.setattr(models, "load_checked", lambda path, sums: given.append(sums) or state)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        ours = backbone(name, __file__)
        images = torch.rand(1, 3, 64, 64)
        expected, found = theirs.forward_features(images), ours(images)
    assert given == [weights.known(name)]
    assert found.shape == expected.shape
    assert expected.std() > 0
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_file_with_any_known_sum_is_loaded(tmp_path):
    """Old torchvision's names ("norm.1") and format; the second of two sums is the file's."""
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {
        re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): value
        for name, value in state.items()
        if "tracked" not in name
    }
    path = tmp_path / "densenet121.pth"
    torch.save(old, path, _use_new_zipfile_serialization=False)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = models.densenet121(path, sha256=("12345678", digits)).network.state_dict()
    for name in ("denseblock1.denselayer1.conv2.weight", "denseblock4.denselayer16.norm2.running_var"):
        assert torch.equal(loaded[f"features.{name}"], state[f"features.{name}"])
    with pytest.raises(ValueError, match="not the expected weights"):
        models.densenet121(path, sha256=("12345678", "00000000"))
