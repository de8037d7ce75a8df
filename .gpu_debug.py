import torch, vlprune
from vlprune.eval import shapes, bench
shapes.VICUNA_7B["num_hidden_layers"] = 4
dev = torch.device("cuda")
l = shapes.load("llava-1.5-7b", torch.bfloat16, "sdpa", dev); m = l.model
p = shapes.random_prompt(m, 8, 576, 64)
print({k: (tuple(v.shape), v.dtype, v.device) for k, v in p.inputs.items()})
with torch.inference_mode():
    def f(): return m.model.get_image_features(p.inputs["pixel_values"], return_dict=True)
    fs = [f() for _ in range(4)]
    fe = [torch.cat(list(x.pooler_output)) for x in fs]
    print("features repeat", [torch.equal(fe[0], x) for x in fe])
    hs = [x.hidden_states for x in fs]
    e = [m.model.vision_tower(p.inputs["pixel_values"], output_hidden_states=True).hidden_states for _ in range(3)]
    for i in (0, 1, 2, 12, 23): print("tower layer", i, [torch.equal(e[0][i], x[i]) for x in e])
    emb = [ (m.model.vision_tower.embeddings if hasattr(m.model.vision_tower, "embeddings") else m.model.vision_tower.vision_model.embeddings)(p.inputs["pixel_values"]) for _ in range(5)]
    print("embeddings", [torch.equal(emb[0], x) for x in emb])
    lg = [bench._logits(m, p) for _ in range(4)]

    x = torch.randn(8, 640, 4096, device=dev, dtype=torch.bfloat16)
    t = [m.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state for _ in range(4)]
    print("text repeat", [torch.equal(t[0], y) for y in t])
    torch.backends.cudnn.deterministic = True
    emb = [ (m.model.vision_tower.embeddings if hasattr(m.model.vision_tower, "embeddings") else m.model.vision_tower.vision_model.embeddings)(p.inputs["pixel_values"]) for _ in range(5)]
    print("embeddings cudnn det", [torch.equal(emb[0], x) for x in emb])
    lg = [bench._logits(m, p) for _ in range(4)]

