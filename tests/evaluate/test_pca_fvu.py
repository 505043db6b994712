import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from sarm.evaluate.sae_quality import pca_fvu


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_it_is_what_scikit_learns_components_leave_unexplained(rank):
    generator = torch.Generator().manual_seed(0)
    mixing_DD = torch.randn(10, 10, generator=generator)
    train_ND, unseen_MD = (torch.randn(n, 10, generator=generator) @ mixing_DD + 3 for n in (80, 30))
    pca = PCA(rank, svd_solver="full").fit(train_ND.double().numpy())
    x_MD = unseen_MD.double().numpy()
    x_hat_MD = pca.inverse_transform(pca.transform(x_MD))
    wanted = np.square(x_MD - x_hat_MD).sum() / np.square(x_MD - x_MD.mean(0)).sum()
    assert pca_fvu(train_ND, unseen_MD, rank) == pytest.approx(wanted, rel=1e-9)


def test_all_components_leave_nothing_and_no_rows_have_no_figure():
    rows_ND = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert pca_fvu(rows_ND, rows_ND, 4) == pytest.approx(0, abs=1e-12)
    assert pca_fvu(rows_ND[:0], rows_ND, 2) is None
    assert pca_fvu(rows_ND, rows_ND[:0], 2) is None
