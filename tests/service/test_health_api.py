"""Probes, metrics and the documentation: what is open to all, and true."""

import re

import pytest
from jsonschema import Draft202012Validator


def test_ready_says_what_answers(lasting_client):
    ready = lasting_client.get("/readyz").json()
    assert ready == {"status": "ready", "model": "tiny", "provider": "cpu"}
    assert lasting_client.get("/healthz").json() == {"status": "alive"}


def test_probes_and_documentation_need_no_token_and_all_else_does(client_for, image):
    client = client_for(admin_token="adm", predict_token="pre")
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/favicon.ico"):
        assert client.get(path).status_code == 200, path
    assert client.get("/").status_code == 307
    assert client.post("/predict", content=image).status_code == 401
    for path in ("/models", "/models/tiny", "/priors", "/priors/default", "/monitor", "/monitor/tau-curve"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer realm="tare"'), path
        assert client.get(path, headers={"Authorization": "Bearer pre"}).status_code == 200, path
    assert client.put("/priors", json={"uniform": True}).status_code == 401
    for token, status in (("pre", 403), ("adm", 200)):
        answer = client.put("/priors", json={"uniform": True}, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status


def test_metrics_count_what_happened(client, image):
    client.post("/predict", files=[("a", image), ("b", image)])
    client.post("/predict", content=b"junk")
    prediction = client.post("/predict?method=none", content=image).json()["predictions"][0]["prediction_id"]
    client.post("/feedback", json={"prediction_id": prediction, "label": "red"})
    client.get("/nowhere")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(re.findall(r"^(tare_\S+) (\S+)$", answer.text, re.MULTILINE))
    assert values['tare_requests_total{method="POST",route="/predict",status="200"}'] == "2.0"
    assert values['tare_problems_total{code="unknown-image-format"}'] == "1.0"
    assert values['tare_requests_total{method="GET",route="unmatched",status="404"}'] == "1.0"
    assert values['tare_predictions_total{method="logit-adjustment",model="tiny"}'] == "2.0"
    assert values['tare_predictions_total{method="none",model="tiny"}'] == "1.0"
    assert values['tare_feedback_total{outcome="accepted"}'] == "1.0"
    assert values['tare_queue_images{model="tiny"}'] == "0.0"
    assert float(values["tare_queue_limit_images"]) > 0
    assert float(values['tare_batch_images_sum{model="tiny"}']) == 3
    assert float(values["tare_store_commit_seconds_count"]) >= 2
    assert values["tare_held_body_bytes"] == "0.0"
    assert [key for key in values if key.startswith("tare_model_info{")]
    assert [key for key in values if key.startswith("tare_priors_version{")]


@pytest.mark.parametrize(
    "path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/models", "/"]
)
def test_an_unknown_parameter_is_refused_on_every_path(lasting_client, path):
    assert lasting_client.get(f"{path}?when=now").json()["parameter"] == "when"


def test_the_documentation_comes_from_this_host_alone(client):
    page = client.get("/docs")
    assert not re.findall(r"(?:https?:)?//", page.text)
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    for address in re.findall(r'(?:href|src)="([^"]+)"', page.text):
        assert client.get(f"/{address}").status_code == 200, address
    assert "validatorUrl: null" in client.get("/docs/start.js").text
    assert client.get("/").headers["location"] == "docs"


def test_the_document_describes_every_route_its_body_and_its_answer(client):
    document = client.get("/openapi.json").json()
    assert document["info"]["title"] == "Tare"
    paths = document["paths"]
    assert set(paths) >= {
        *("/predict", "/adjust", "/models", "/models/{name}", "/healthz", "/readyz", "/metrics"),
        *("/priors", "/priors/{name}", "/priors/{name}/versions", "/priors/{name}/rollback"),
        *("/feedback", "/predictions/{prediction_id}", "/monitor", "/monitor/tau-curve"),
    }
    assert set(paths["/predict"]["post"]["requestBody"]["content"]) >= {"multipart/form-data"}
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method in ("post", "put")), (method, path)
            good = [status for status in operation["responses"] if status.startswith("2")]
            assert good, (method, path)
            for status in good:
                if status != "204":
                    content = next(iter(operation["responses"][status]["content"].values()))
                    assert content["schema"], (method, path)
            assert "default" in operation["responses"]
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', client.get("/openapi.json").text))
    assert references <= set(document["components"]["schemas"])


def test_answers_are_what_the_document_says(client, image):
    document = client.get("/openapi.json").json()
    predicted = client.post("/predict?include=logits", content=image)
    identity = predicted.json()["predictions"][0]["prediction_id"]
    answers = {
        ("post", "/predict"): predicted,
        ("post", "/adjust"): client.post("/adjust", json={"logits": [[1, 2, 3, 4]]}),
        ("post", "/feedback"): client.post("/feedback", json={"prediction_id": identity, "index": 1}),
        ("get", "/predictions/{prediction_id}"): client.get(f"/predictions/{identity}"),
        ("put", "/priors/{name}"): client.put("/priors/even", json={"uniform": True}),
        ("post", "/priors/{name}/rollback"): client.post("/priors/even/rollback", json={"version": 1}),
        ("get", "/priors/{name}"): client.get("/priors/even"),
        ("get", "/models/{name}"): client.get("/models/tiny"),
        **{
            ("get", path): client.get(path)
            for path in ("/models", "/priors", "/monitor", "/monitor/tau-curve", "/healthz", "/readyz")
        },
    }
    for (method, path), answer in answers.items():
        assert answer.status_code == 200, (method, path, answer.text)
        described = document["paths"][path][method]["responses"]["200"]
        schema = described["content"]["application/json"]["schema"]
        Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())
        assert ("etag" in answer.headers) == ("ETag" in described["headers"]), (method, path)


def test_the_document_names_the_conditions_of_a_change(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path, method in (
        ("/priors", "put"),
        ("/priors/{name}", "put"),
        ("/priors/{name}", "delete"),
        ("/priors/{name}/rollback", "post"),
    ):
        headers = {one["name"] for one in paths[path][method]["parameters"] if one["in"] == "header"}
        assert headers == {"If-Match", "If-None-Match"}, (path, method)


def test_the_document_names_the_deadline_of_a_prediction(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/predict", "/v2/models/{name}/infer"):
        (header,) = [
            one
            for one in paths[path]["post"]["parameters"]
            if one["in"] == "header" and "Timeout" in one["name"]
        ]
        assert header["name"] == "X-Request-Timeout-Ms"
        assert not header["required"]


def test_every_answer_says_where_its_time_went(client, image):
    assert client.get("/models").headers["server-timing"].startswith("total;dur=")
    assert client.get("/nowhere").headers["server-timing"].startswith("total;dur=")
    for answer in (client.post("/predict", content=image), client.post("/predict", files=[("a", image)])):
        named = re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["server-timing"])
        assert [name for name, _ in named] == ["queue", "decode", "infer", "store", "total"]


def test_the_stages_are_counted_once_for_each_request(client, image):
    client.post("/predict", files=[("a", image), ("b", image)])
    client.post("/predict", content=image)
    client.post("/predict", content=b"junk")
    text = client.get("/metrics").text
    for stage in ("queue", "decode", "infer", "store", "total"):
        assert f'tare_stage_seconds_count{{model="tiny",stage="{stage}"}} 2.0' in text
    assert 'tare_shed_requests_total{model="tiny",reason="queue-full"} 0.0' in text
    assert "tare_deadline_seconds 30.0" in text
