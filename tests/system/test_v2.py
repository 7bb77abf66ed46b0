"""The service through Triton's own client, as it stands in its package."""

import contextlib

import numpy as np
import pytest
from tritonclient import http
from tritonclient.utils import InferenceServerException

from tests import tiny
from tests.process import Service
from tests.service.v2 import noise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny_models):
    """One service for all the tests here, for none minds what the others did."""
    service = Service(tmp_path_factory.mktemp("service"), tiny_models)
    service.start(TARE_ADMIN_TOKEN="adm", TARE_PREDICT_TOKEN="pre")
    yield service
    service.close()


@pytest.fixture
def triton(service):
    """Triton's client of it, with a token in every call."""
    with contextlib.closing(http.InferenceServerClient(f"127.0.0.1:{service.port}")) as client:
        yield Bearer(client)


class Bearer:
    """Triton's client with a token in every call."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        call = getattr(self.client, name)
        return lambda *given, **named: call(*given, headers={"Authorization": "Bearer pre"}, **named)


def files_of(pixels, **how):
    files = np.array([tiny.png(one) for one in pixels], dtype=object)
    tensor = http.InferInput("image", [len(files)], "BYTES")
    return [tensor.set_data_from_numpy(files, **how)]


def pixels_of(pixels, **how):
    tensor = http.InferInput("pixels", list(pixels.shape), "UINT8")
    return [tensor.set_data_from_numpy(pixels, **how)]


def test_tritons_client_finds_the_server_and_the_model(triton):
    assert triton.client.is_server_live()
    assert triton.client.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert not triton.is_model_ready("nobody")
    assert not triton.client.is_model_ready("tiny")  # without a token
    assert triton.get_server_metadata()["name"] == "tare"
    metadata = triton.get_model_metadata("tiny")
    (version,) = metadata["versions"]
    assert triton.get_model_metadata("tiny", version) == metadata
    assert triton.is_model_ready("tiny", version)
    assert triton.get_model_repository_index() == [
        {"name": "tiny", "version": version, "state": "READY", "reason": ""}
    ]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_client_gets_what_predict_answers(triton, service, compression):
    pixels = noise(6)
    said = service.client.post(
        "/predict?tau=1.5&top_k=3&include=logits",
        files=[("f", tiny.png(one)) for one in pixels],
        headers={"Authorization": "Bearer pre"},
    ).json()
    tops = [one["top"] for one in said["predictions"]]
    chosen = {"tau": 1.5, "top_k": 3}
    for inputs in (files_of(pixels), pixels_of(pixels), pixels_of(pixels, binary_data=False)):
        answer = triton.infer(
            "tiny",
            inputs,
            request_id="mine",
            parameters=chosen,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        head = answer.get_response()
        assert (head["id"], head["model_name"]) == ("mine", "tiny")
        assert head["parameters"]["tau"] == 1.5
        labels = [[one.decode() for one in row] for row in answer.as_numpy("labels")]
        assert labels == [[entry["label"] for entry in top] for top in tops]
        assert answer.as_numpy("indices").tolist() == [[entry["index"] for entry in top] for top in tops]
        for name in ("score", "probability"):
            mine = answer.as_numpy({"score": "scores", "probability": "probabilities"}[name])
            np.testing.assert_allclose(mine, [[entry[name] for entry in top] for top in tops], atol=1e-5)
        np.testing.assert_allclose(answer.as_numpy("logits"), tiny.logits(pixels), atol=1e-4)
        assert len({one.decode() for one in answer.as_numpy("prediction_id")}) == len(pixels)


def test_tritons_client_gets_the_outputs_it_asks_for_in_either_form(triton):
    wanted = [
        http.InferRequestedOutput("labels", binary_data=False),
        http.InferRequestedOutput("logits", binary_data=True),
    ]
    answer = triton.infer("tiny", files_of(noise(3)), outputs=wanted)
    assert [one["name"] for one in answer.get_response()["outputs"]] == ["labels", "logits"]
    assert set(answer.as_numpy("labels")[:, 0]) <= set(tiny.LABELS)
    assert answer.as_numpy("logits").shape == (3, 4)
    assert answer.as_numpy("scores") is None


def test_what_tritons_client_sends_is_recorded(triton, service):
    answer = triton.infer("tiny", files_of(noise(2)), parameters={"method": "none"})
    for identity in answer.as_numpy("prediction_id"):
        stored = service.client.get(
            f"/predictions/{identity.decode()}", headers={"Authorization": "Bearer pre"}
        ).json()
        assert stored["adjustment"]["method"] == "none"


def test_tritons_client_reads_every_refusal(triton):
    refused = [
        ("404", lambda: triton.infer("nobody", files_of(noise(1)))),
        ("404", lambda: triton.infer("tiny", files_of(noise(1)), model_version="7")),
        ("404", lambda: triton.infer("tiny", files_of(noise(1)), parameters={"priors": "nobody"})),
        ("422", lambda: triton.infer("tiny", files_of(noise(1)), parameters={"tau": 101})),
        ("422", lambda: triton.infer("tiny", files_of(noise(1)), outputs=[http.InferRequestedOutput("no")])),
        ("413", lambda: triton.infer("tiny", pixels_of(noise(65)))),
        ("401", lambda: triton.client.infer("tiny", files_of(noise(1)))),
        ("404", lambda: triton.load_model("tiny")),
        ("404", lambda: triton.get_inference_statistics("tiny")),
    ]
    for status, call in refused:
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == status
        assert caught.value.message().endswith(".")
