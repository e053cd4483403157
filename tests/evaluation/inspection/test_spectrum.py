"""Spectra of embeddings whose dimension is known."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl_stc3d.evaluation.inspection.curves import model_colours, spectrum_figure
from nnssl_stc3d.evaluation.inspection.spectrum import spectrum


def test_isotropic_noise_has_a_flat_spectrum():
    found = spectrum(np.random.default_rng(0).normal(size=(20000, 8)).astype(np.float32))
    np.testing.assert_allclose(found.shares, 1 / 8, atol=0.005)
    assert found.effective_rank == pytest.approx(8, abs=0.01)
    assert (found.directions_for_90, found.dimension, found.views) == (8, 8, 20000)


def test_embeddings_on_a_line_have_effective_rank_one_wherever_the_line_lies():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 1)) * np.array([[1.0, -2.0, 0.5]]) + np.array([10.0, 0.0, 3.0])
    found = spectrum(rows)
    np.testing.assert_allclose(found.shares, [1, 0, 0], atol=1e-12)
    assert found.effective_rank == pytest.approx(1, abs=1e-5) and found.directions_for_90 == 1


def test_shares_are_the_eigenvalues_of_the_covariance():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(spectrum(rows).shares, eigenvalues / eigenvalues.sum(), rtol=1e-9)
    singular = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    assert spectrum(rows).effective_rank == pytest.approx(float(np.exp(-(singular * np.log(singular)).sum())))


def test_fewer_views_than_dimensions_span_one_direction_less():
    found = spectrum(np.random.default_rng(0).normal(size=(5, 30)))
    assert found.shares.shape == (4,) and found.shares.sum() == pytest.approx(1)


def test_collapsed_embeddings():
    found = spectrum(np.ones((10, 4)))
    assert (found.shares == 0).all() and np.isfinite(found.effective_rank)


@pytest.mark.parametrize("rows", [np.ones((1, 3)), np.full((4, 3), np.nan)])
def test_what_has_no_spectrum(rows):
    with pytest.raises(ValueError, match="at least 2 finite embeddings"):
        spectrum(rows)


def test_the_figure_is_drawn_for_any_number_of_networks():
    rng = np.random.default_rng(0)
    png = spectrum_figure({name: spectrum(rng.normal(size=(20, 4))) for name in ("STC3D", "scratch")})
    assert png.startswith(b"\x89PNG")
    names = [f"network {i}" for i in range(15)]
    assert set(model_colours([*names, "scratch"])) == {*names, "scratch"}
