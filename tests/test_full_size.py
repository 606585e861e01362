"The sizes of the real thing, with random weights, on the CPU."
import pytest, torch


@pytest.mark.slow
def test_videomae_huge_and_its_projection():
    "One clip of 16 x 224 x 224 through VideoMAE-H in bfloat16: about 1.3 GB."
    from transformers import VideoMAEConfig, VideoMAEModel
    from stjepa.projection import TokenStats, fit_projection
    from stjepa.teacher import Teacher
    from stjepa.video import View, to_pixels
    config = VideoMAEConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120)
    before = torch.get_default_dtype(); torch.set_default_dtype(torch.bfloat16)
    try: model = VideoMAEModel(config)
    finally: torch.set_default_dtype(before)
    teacher = Teacher(model, View())
    assert 630e6 < sum(p.numel() for p in teacher.parameters()) < 634e6
    assert teacher.grid() == (8, 14, 14) and teacher.width == 1280
    frames = torch.randint(0, 256, (1, 16, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = teacher(to_pixels(frames, teacher.view()))
    assert tokens.shape == (1, 1568, 1280) and tokens.isfinite().all()
    stats = TokenStats(1280).update(tokens)
    for kind, dim in dict(pca=384, pca_whiten=384, orthogonal=384, none=1280).items():
        projection = fit_projection(stats, kind=kind)
        targets = projection(tokens)[0].half()
        assert targets.shape == (1568, dim) and targets.dtype == torch.float16 and targets.isfinite().all()
        assert targets.abs().max() <= projection.bound < 7200

@pytest.mark.slow
def test_the_student_at_full_size():
    "27 M parameters; tokens of a full clip, and the predicted ones from a tenth of it."
    from stjepa.masking import clip_masks
    from stjepa.objective import Predictor
    from stjepa.student import Student, StudentConfig, num_params
    torch.manual_seed(0)
    student = Student(StudentConfig()).eval()
    assert 26e6 < num_params(student) < 28e6
    frames = torch.randint(0, 256, (1, 16, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    visible_idx, query_idx = clip_masks("random", (14, 14), 0.9, 1, 1.0, 0, 0, 0)
    with torch.inference_mode():
        tokens = student(frames)
        predicted = Predictor(student.config)(student(frames, visible_idx), query_idx)
    assert tokens.shape == (1, 1568, 384) and tokens.isfinite().all()
    assert predicted.shape == (1, 8 * 176, 384) and predicted.isfinite().all()
