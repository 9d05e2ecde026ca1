//! Pictures of a report, as SVG.

use std::fmt::Write as _;

use super::report::{Measured, median};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 300.0;
const RIGHT: f64 = 90.0;
const LINE: f64 = 22.0;
const STYLE: &str = "text{font:13px sans-serif;fill:#222}.mark{fill:#2b6cb0}.dot{fill:#2b6cb0;fill-opacity:.45}\
                     .middle{stroke:#c05621;stroke-width:2}.axis{stroke:#999}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn picture(title: &str, lines: usize, body: &str) -> String {
    let height = LINE * (lines as f64 + 3.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\
         <style>{STYLE}</style><rect width=\"100%\" height=\"100%\" fill=\"white\"/>\
         <text x=\"12\" y=\"24\" font-weight=\"bold\">{}</text>{body}</svg>\n",
        escaped(title)
    )
}

/// Where a value lies between the margins, when the largest is `most`.
fn x(value: f64, most: f64) -> f64 {
    let share = if most > 0.0 { (value / most).clamp(0.0, 1.0) } else { 0.0 };
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

/// One start, a bar a phase from its beginning to its end.
pub(crate) fn timeline(measured: &Measured) -> String {
    let most = measured.timeline.last().map_or(0.0, |(_, ms)| *ms);
    let mut body = String::new();
    let mut before = 0.0;
    for (line, (name, ms)) in measured.timeline.iter().enumerate() {
        let y = LINE * (line as f64 + 2.0);
        let (from, to) = (x(before, most), x(*ms, most));
        // Writing to a string does not fail.
        let _ = write!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"mark\" x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"14\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{ms:.1}</text>",
            LEFT - 10.0,
            y + 12.0,
            escaped(name),
            (to - from).max(1.0),
            to + 6.0,
            y + 12.0
        );
        before = *ms;
    }
    let title = format!("One start with Vial, ms since the shim's exec ({})", measured.mode);
    picture(&title, measured.timeline.len(), &body)
}

/// Every sample of the measurements in milliseconds as a dot, the median as a stroke.
pub(crate) fn distributions(measured: &Measured) -> String {
    let timed: Vec<_> = measured.series.iter().filter(|series| series.unit == "ms").collect();
    let most = timed.iter().flat_map(|s| s.samples.iter().copied()).fold(0.0, f64::max);
    let mut body = String::new();
    for (line, series) in timed.iter().enumerate() {
        let y = LINE * (line as f64 + 2.0) + 7.0;
        let middle = x(median(&series.samples), most);
        let _ = write!(
            body,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <line class=\"axis\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <line class=\"middle\" x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{:.1}</text>",
            LEFT - 10.0,
            y + 5.0,
            escaped(&format!("{} · {}", series.id, series.subject)),
            WIDTH - RIGHT,
            y - 8.0,
            y + 8.0,
            WIDTH - RIGHT + 8.0,
            y + 5.0,
            median(&series.samples)
        );
        for sample in &series.samples {
            let _ = write!(
                body,
                "<circle class=\"dot\" cx=\"{:.1}\" cy=\"{y:.1}\" r=\"4\"/>",
                x(*sample, most)
            );
        }
    }
    picture(&format!("Every sample, in ms ({})", measured.mode), timed.len(), &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::Series;

    #[test]
    fn pictures_hold_every_phase_and_sample() {
        let measured = Measured {
            mode: "wall".into(),
            series: vec![Series {
                id: "ctr_run".into(),
                subject: "a<b".into(),
                unit: "ms".into(),
                samples: vec![1.0, 2.0, 4.0],
            }],
            timeline: vec![("shim exec".into(), 0.0), ("guest & agent".into(), 7.5)],
            ..Measured::default()
        };
        let drawn = distributions(&measured);
        assert_eq!(drawn.matches("<circle").count(), 3);
        assert!(drawn.contains("a&lt;b") && drawn.ends_with("</svg>\n"));
        let drawn = timeline(&measured);
        assert_eq!(drawn.matches("<rect class").count(), 2);
        assert!(drawn.contains("guest &amp; agent") && drawn.contains("7.5"));
    }

    #[test]
    fn values_stay_between_the_margins() {
        assert_eq!(x(0.0, 10.0), LEFT);
        assert_eq!(x(10.0, 10.0), WIDTH - RIGHT);
        assert_eq!(x(99.0, 10.0), WIDTH - RIGHT);
        assert_eq!(x(1.0, 0.0), LEFT);
    }
}
