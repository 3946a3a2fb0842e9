"""The configuration refuses what it doesn't know, and says which key it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from serving.config import BUNDLED, ConfigError, ServiceConfig, bundled, load_config, parse_config

YAML_FOR_RAY = Path(__file__).parents[2] / "serving" / "deployments" / "rushes.yaml"


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"modells": {}}, "modells"),
        ({"models": {}}, "models"),
        ({"models": ["mini"]}, "models"),
        ({"port": 0}, "port"),
        ({"port": "eighty"}, "port"),
        ({"denoiser": {"max_row": 4}}, "denoiser.max_row"),
        ({"denoiser": {"max_rows": 1}}, "denoiser.max_rows"),
        ({"decoder": {"autoscaling": {"min_replica": 1}}}, "decoder.autoscaling.min_replica"),
        ({"decoder": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "decoder.autoscaling"),
        ({"text_encoder": {"threads": 0}}, "text_encoder.threads"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"retiring": {"other": "/bundles/old"}}, "retiring.other"),
        ({"models": {"wan": "/bundles/wan"}, "retiring": {"wan": "/bundles/wan"}}, "retiring.wan"),
        ([], "the whole"),
    ],
    ids=str,
)
def test_a_wrong_key_is_named(values: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: "):
        parse_config(values)


def test_files_are_read_and_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rushes.yaml"
    path.write_text("port: 9000\ndenoiser:\n  max_rows: 4\n")
    config = load_config(path)
    assert (config.port, config.denoiser.max_rows, config.decoder) == (9000, 4, ServiceConfig().decoder)
    path.write_text("")
    assert load_config(path) == ServiceConfig()
    path.write_text("port: [")
    with pytest.raises(ConfigError, match=r"rushes\.yaml: not YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_bundle_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.big: no bundle at"):
        ServiceConfig(models={"big": tmp_path}).resolved()
    with pytest.raises(ConfigError, match=r"retiring\.mini: no bundle at"):
        ServiceConfig(retiring={"mini": tmp_path}).resolved()


def test_bundled_models_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"models": {"ours": "mini", "live": "mini-causal"}}).resolved()
    assert config.models == {"ours": BUNDLED["mini"].resolve(), "live": BUNDLED["mini-causal"].resolve()}
    assert bundled("mini-other") == Path("mini-other")
    (tmp_path / "mini").mkdir()  # the user's own comes first
    assert bundled("mini") == Path("mini")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"decoder": {"autoscaling": {"max_replicas": 2}}}, "decoder.autoscaling.max_replicas"),
        ({"runner": {"replicas": 2}}, "runner.replicas"),
        ({"api": {"replicas": 3}}, "api.replicas"),
        ({"retiring": {"mini": "/bundles/old"}}, "retiring"),
    ],
)
def test_a_fused_service_has_one_of_everything(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_config({"fused": True, **values})
    parse_config(values)


def test_the_defaults_fit_on_two_cores() -> None:
    assert ServiceConfig().cores() <= 2


def test_every_field_is_described() -> None:
    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(ServiceConfig)


def test_the_file_for_serve_run_has_only_keys_that_ray_and_the_service_know() -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    document = yaml.safe_load(YAML_FOR_RAY.read_text())
    ServeDeploySchema.model_validate(document)
    # Ray drops keys that it doesn't know.
    assert document.keys() <= ServeDeploySchema.model_fields.keys()
    assert document["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
    (application,) = document["applications"]
    assert application.keys() <= ServeApplicationSchema.model_fields.keys()
    assert application["import_path"] == "serving.deployments.app:build_app"
    parse_config(application["args"])
