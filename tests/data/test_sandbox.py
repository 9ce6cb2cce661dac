import pytest

from kitae.data.sandbox import compile_template, why_unsafe

HARMLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"


def test_a_real_template_passes_its_trial(shared_data):
    for path in sorted((shared_data / "templates" / "2026").glob("*.jinja")):
        assert why_unsafe(path.read_text(encoding="utf-8")) is None, path.name


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "reaches for something it must not"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "reaches for something it must not"),
        (
            "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
            "reaches for something it must not",
        ),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "needs more than"),
        ("{{ ('a' * 999999999) | length }}", "too much memory"),
        ("{{ 'a' | center(2000000000) | length }}", "too much memory"),
        ("{{ (9 ** (9 ** 9)) | string | length }}", "needs more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too much memory"),
        ("{{ 'a' * 2000000 }}", "more than 1 MiB"),
        ("{{ 1 }}" * 20_000, "larger than 64 KiB"),
        ("{% if %}", "syntax error in line 1"),
    ],
)
def test_a_hostile_template_is_refused_with_the_reason(template, reason):
    found = why_unsafe(template)
    assert found is not None
    assert reason in found


def test_the_trial_does_not_judge_what_a_template_says_about_roles():
    assert why_unsafe("{{ raise_exception('no system role') }}") is None


def test_files_are_out_of_reach():
    with pytest.raises(TypeError, match="no loader"):
        compile_template("{% include '/etc/passwd' %}").render()


def test_todays_date_is_the_same_tomorrow():
    assert compile_template("{{ strftime_now('%d %b %Y') }}").render() == "26 Jul 2024"


def test_generation_marks_render_as_their_content():
    assert compile_template("a{% generation %}b{% endgeneration %}c").render() == "abc"


def test_json_is_written_as_transformers_writes_it():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    text = "{{ x | tojson }}|{{ x | tojson(indent=2) }}|"
    text += "{% for i in x.b %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    value = {"a": "<é>'", "b": [1, 2]}
    assert compile_template(text).render(x=value) == _compile_jinja_template(text).render(x=value)
