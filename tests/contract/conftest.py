"""The API servers that tests of Kubernetes run on: the fake one always, a real one where one is given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cluster.kube_cluster import GIVEN, RealCluster, given_cluster


@pytest.fixture(scope="session")
def real_cluster() -> Iterator[RealCluster]:
    """A cluster made of the programs in KUBEBUILDER_ASSETS, or that of KUBECONFIG where it was chosen."""
    with given_cluster() as cluster:
        yield cluster


@pytest.fixture(params=["fake", *(["real"] if GIVEN else [])])
def api_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `tests.helpers.cluster.kube` use one API server, then the other."""
    if request.param == "real":
        monkeypatch.setattr("tests.helpers.cluster.kube.REAL", request.getfixturevalue("real_cluster"))
