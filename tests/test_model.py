"""A quantized network is a module like any other."""

import torch

X = torch.randn(4, 1, 8, 8)


def test_it_compiles_without_a_recompile_between_steps(tiny):
    compiled = torch.compile(tiny, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (900, 300, 0):
            step = torch.full((4,), t)
            torch.testing.assert_close(compiled(X, step), tiny(X, step))


def test_it_exports_as_it_is(tiny, tmp_path):
    t = torch.tensor([300, 0, 900, 500])
    with torch.no_grad():
        program = torch.export.export(tiny, (X, t), strict=False)
        torch.export.save(program, tmp_path / "q.pt2")
        assert torch.equal(torch.export.load(tmp_path / "q.pt2").module()(X, t), tiny(X, t))


def test_train_and_eval_are_harmless(tiny):
    with torch.no_grad():
        expected = tiny(X, 300)
        assert torch.equal(tiny.train().eval()(X, 300), expected)
